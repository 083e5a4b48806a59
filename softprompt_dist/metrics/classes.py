"""Answers of a label set, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.classification import prediction_classes, target_classes
from softprompt_dist.metrics.table import markdown_table

# C classes (the labels and, last, invalid), L labels
INVALID = "(invalid)"
"""Name of the class of all strings that are no label."""


@dataclass(frozen=True)
class ClassScore:
    """How one label was answered; shares in percent."""

    label: str
    num_targets: int
    num_predictions: int
    precision: float | None
    """Share of right ones among its predictions; None where it was never predicted."""
    recall: float | None
    """Share of right ones among its targets; None where it never was the target."""
    f1: float | None
    """None where it was neither."""


def confusion_counts(answers: Sequence[Answer], labels: Sequence[str]) -> NDArray[np.int64]:
    """How often each label was answered how, counts_LC.

    Raises:
        DataError: a target is no label.
    """
    targets_AL = target_classes(answers, labels)[:, :-1]
    return np.rint(targets_AL.T @ prediction_classes(answers, labels)).astype(np.int64)


def class_scores(counts_LC: NDArray[np.int64], labels: Sequence[str]) -> list[ClassScore]:
    """One for each label, and one for `INVALID`."""
    num_targets = [*counts_LC.sum(axis=1).tolist(), 0]
    num_predictions = counts_LC.sum(axis=0).tolist()
    hits = [*counts_LC.diagonal().tolist(), 0]
    rows = zip([*labels, INVALID], num_targets, num_predictions, hits, strict=True)
    return [_class_score(*row) for row in rows]


def class_table(scores: Sequence[ClassScore]) -> str:
    """Markdown table of classes, aligned for a terminal too."""
    rows = [
        (
            score.label,
            str(score.num_targets),
            str(score.num_predictions),
            *map(_percent, (score.precision, score.recall, score.f1)),
        )
        for score in scores
    ]
    return markdown_table(("label", "n", "predicted", "precision", "recall", "F1"), rows)


def _class_score(label: str, num_targets: int, num_predictions: int, hits: int) -> ClassScore:
    if label == INVALID:
        return ClassScore(label, num_targets, num_predictions, None, None, None)
    return ClassScore(
        label,
        num_targets,
        num_predictions,
        _share(hits, num_predictions),
        _share(hits, num_targets),
        _share(2 * hits, num_predictions + num_targets),
    )


def _share(part: int, total: int) -> float | None:
    return 100 * part / total if total else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1f}"
