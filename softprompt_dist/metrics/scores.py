"""Scores of answers: values, a task's score, bootstrap intervals, what was no answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softprompt_dist.errors import DataError
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.bootstrap import group_indices, percentile_interval, resampled_values
from softprompt_dist.metrics.metric import Floats, Metric, Weighted, fact
from softprompt_dist.metrics.registry import find_metrics

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """What answers are worth, in percent, unrounded."""

    values: Mapping[str, float]
    """Name of a value, such as `f1` -> percent."""
    intervals: Mapping[str, Interval]
    """Name of a value -> 95 % bootstrap interval. Empty without resamples."""
    score: float
    """The task's score: the mean of `values`."""
    score_interval: Interval | None
    """95 % bootstrap interval of `score`. None without resamples."""
    num_answers: int
    invalid: Mapping[str, int]
    """Predictions that are no answer -> how often, most frequent first."""

    @property
    def num_invalid(self) -> int:
        """How many predictions are no answer."""
        return sum(self.invalid.values())


@dataclass(frozen=True)
class Difference:
    """How far two scores on the same rows are apart, in points (differences of percent)."""

    points: float
    interval: Interval
    """95 % interval of a paired bootstrap."""


def measure(
    names: Sequence[str],
    answers: Sequence[Answer],
    labels: Sequence[str] = (),
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """Judge answers by the metrics of these names.

    Args:
        names: of `METRICS`.
        answers: of one split, in its order.
        labels: the task's label set in its order; empty for free text.
        num_resamples: for the intervals; 0 leaves them out.
        seed: of the resamples; the same one gives the same intervals.

    Raises:
        ConfigError: see `find_metrics`.
        DataError: there are no answers, a target is no label, or a fact is missing.
    """
    metrics = find_metrics(names, labels)
    weighted = _weighted(metrics, answers, labels)
    values = _counted_once(weighted, len(answers))
    intervals, score_interval = {}, None
    if num_resamples > 0:
        resampled = resampled_values(weighted, _groups(metrics, answers), num_resamples, seed)
        intervals = {name: percentile_interval(values_R) for name, values_R in resampled.items()}
        score_interval = percentile_interval(_mean(resampled))
    score = sum(values.values()) / len(values)
    invalid = _invalid(metrics, answers, labels)
    return Scores(values, intervals, score, score_interval, len(answers), invalid)


def compare(
    names: Sequence[str],
    answers: Sequence[Answer],
    others: Sequence[Answer],
    labels: Sequence[str] = (),
    *,
    num_resamples: int = 1000,
) -> Difference:
    """By how much the score of `answers` is above that of `others` to the same rows.

    Both are scored on the same resamples, so that rows that are hard for both cancel out.

    Raises:
        ValueError: they do not answer the same rows.
        SoftpromptError: see `measure`.
    """
    if [answer.target for answer in answers] != [other.target for other in others]:
        raise ValueError("Only answers to the same rows can be compared.")
    metrics = find_metrics(names, labels)
    ours, theirs = (_weighted(metrics, each, labels) for each in (answers, others))

    def difference(weights_RA: Floats) -> dict[str, Floats]:
        return {"points": _mean(ours(weights_RA)) - _mean(theirs(weights_RA))}

    groups = _groups(metrics, answers)
    resampled = resampled_values(difference, groups, num_resamples, seed=0)["points"]
    points = _counted_once(difference, len(answers))["points"]
    return Difference(points, percentile_interval(resampled))


def _weighted(
    metrics: Sequence[Metric], answers: Sequence[Answer], labels: Sequence[str]
) -> Weighted:
    """All values of the metrics as one function of weights."""
    if not answers:
        raise DataError("There are no answers to score. Choose a split that has rows.")
    prepared = [metric.prepare(answers, labels) for metric in metrics]

    def values(weights_RA: Floats) -> dict[str, Floats]:
        return {name: v for each in prepared for name, v in each(weights_RA).items()}

    return values


def _counted_once(weighted: Weighted, num_answers: int) -> dict[str, float]:
    return {name: float(v[0]) for name, v in weighted(np.ones((1, num_answers))).items()}


def _mean(values: Mapping[str, Floats]) -> Floats:
    mean: Floats = np.mean(list(values.values()), axis=0)
    return mean


def _groups(metrics: Sequence[Metric], answers: Sequence[Answer]) -> NDArray[np.int64]:
    grouped = next((metric for metric in metrics if metric.grouped), None)
    if grouped is None:
        return np.arange(len(answers), dtype=np.int64)
    return group_indices([fact(answer, "group", grouped.name) for answer in answers])


def _invalid(
    metrics: Sequence[Metric], answers: Sequence[Answer], labels: Sequence[str]
) -> dict[str, int]:
    rules = [metric.is_invalid for metric in metrics if metric.is_invalid is not None]
    strange = Counter(
        answer.prediction for answer in answers if any(rule(answer, labels) for rule in rules)
    )
    return dict(strange.most_common())
