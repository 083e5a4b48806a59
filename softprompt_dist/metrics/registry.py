"""Metrics by name."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

from softprompt_dist.errors import ConfigError
from softprompt_dist.metrics.classification import (
    ACCURACY,
    F1,
    MACRO_F1,
    MATTHEWS,
    MEAN_3CLASS_F1,
)
from softprompt_dist.metrics.correlation import PEARSON, SPEARMAN
from softprompt_dist.metrics.metric import Metric
from softprompt_dist.metrics.questions import MULTIRC, RECORD, SQUAD, TRIVIA_QA
from softprompt_dist.metrics.referent import WSC

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        F1,
        MACRO_F1,
        MEAN_3CLASS_F1,
        MATTHEWS,
        PEARSON,
        SPEARMAN,
        SQUAD,
        TRIVIA_QA,
        RECORD,
        MULTIRC,
        WSC,
    )
}


def find_metrics(names: Sequence[str], labels: Sequence[str] | None = None) -> tuple[Metric, ...]:
    """The metrics of these names; with `labels`, also whether they suit a task with these labels.

    Raises:
        ConfigError: a name is unknown, none is given, two metrics give a value of the same name, or
            a metric needs other labels.
    """
    if not names:
        raise ConfigError(f"A task needs at least one metric. Choose of {', '.join(METRICS)}.")
    metrics = tuple(_find_metric(name) for name in dict.fromkeys(names))
    given = Counter(value for metric in metrics for value in metric.gives)
    double = [value for value, count in given.items() if count > 1]
    if double:
        raise ConfigError(
            f"The metrics {', '.join(names)} give {', '.join(double)} more than once. Keep one."
        )
    if labels is not None:
        for metric in metrics:
            _check_labels(metric, labels)
    return metrics


def _find_metric(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    close = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"There is no metric {name!r}. {hint}Known: {', '.join(METRICS)}.")


def _check_labels(metric: Metric, labels: Sequence[str]) -> None:
    needed = {"two": len(labels) == 2, "needed": len(labels) >= 1}
    if not needed.get(metric.labels, True):
        rule = "exactly two labels" if metric.labels == "two" else "labels"
        raise ConfigError(
            f"The metric {metric.name} needs a task with {rule}, but this one has "
            f"{len(labels)}. Give it its labels, or choose another metric."
        )
