"""Metrics of answers that should be one of a few labels; any other string is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from softprompt_dist.errors import DataError
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.metric import (
    Floats,
    Metric,
    Prepare,
    Weighted,
    equals_target,
    outside_labels,
    ratio,
    weighted_mean,
)

# A answers, C classes (the labels and, last, invalid), R resamples


def one_hot(texts: Sequence[str], labels: Sequence[str]) -> Floats:
    """Which label each text is, [A, C]; the last class takes every other string."""
    index = {label: i for i, label in enumerate(labels)}
    classes_A = [index.get(text, len(labels)) for text in texts]
    return np.eye(len(labels) + 1)[classes_A]


def target_classes(answers: Sequence[Answer], labels: Sequence[str]) -> Floats:
    """`one_hot` of the targets.

    Raises:
        DataError: a target is no label, as in a test set whose answers are withheld.
    """
    known = set(labels)
    strange = next((answer for answer in answers if answer.target not in known), None)
    if strange is not None:
        raise DataError(
            f"The target {strange.target!r} is none of the labels {', '.join(map(repr, labels))}. "
            "Score a split whose rows have their labels, such as validation."
        )
    return one_hot([answer.target for answer in answers], labels)


def prediction_classes(answers: Sequence[Answer], labels: Sequence[str]) -> Floats:
    """`one_hot` of the predictions."""
    return one_hot([answer.prediction for answer in answers], labels)


def f1_of_second_label(answers: Sequence[Answer], labels: Sequence[str]) -> Weighted:
    """F1 of the second label; an invalid string counts as the label that is not the target.

    T5's `f1_score_with_invalid`.
    """
    targets_A = target_classes(answers, labels)[:, 1]
    predictions_AC = prediction_classes(answers, labels)
    predicted_A = np.where(predictions_AC[:, 2] == 1, 1 - targets_A, predictions_AC[:, 1])

    def f1(weights_RA: Floats) -> Mapping[str, Floats]:
        hits_R = weights_RA @ (targets_A * predicted_A)
        return {"f1": 200 * ratio(hits_R, weights_RA @ (targets_A + predicted_A))}

    return f1


def _accuracy(answers: Sequence[Answer], labels: Sequence[str]) -> Weighted:
    if labels:
        target_classes(answers, labels)
    mean = weighted_mean(np.array([float(equals_target(a)) for a in answers]))
    return lambda weights_RA: {"accuracy": 100 * mean(weights_RA)}


def _macro_f1(name: str, answers: Sequence[Answer], labels: Sequence[str]) -> Weighted:
    targets_AC = target_classes(answers, labels)[:, :-1]
    predictions_AC = prediction_classes(answers, labels)[:, :-1]

    def mean_f1(weights_RA: Floats) -> Mapping[str, Floats]:
        hits_RC = weights_RA @ (targets_AC * predictions_AC)
        f1_RC = 2 * ratio(hits_RC, weights_RA @ (targets_AC + predictions_AC))
        return {name: 100 * f1_RC.mean(axis=1)}

    return mean_f1


def _matthews(answers: Sequence[Answer], labels: Sequence[str]) -> Weighted:
    targets_AC = target_classes(answers, labels)
    predictions_AC = prediction_classes(answers, labels)
    correct_A = (targets_AC * predictions_AC).sum(axis=1)

    def correlation(weights_RA: Floats) -> Mapping[str, Floats]:
        total_R = weights_RA.sum(axis=1)
        target_RC, predicted_RC = weights_RA @ targets_AC, weights_RA @ predictions_AC
        agreement_R = (weights_RA @ correct_A) * total_R - (target_RC * predicted_RC).sum(axis=1)
        target_spread_R = total_R**2 - (target_RC**2).sum(axis=1)
        predicted_spread_R = total_R**2 - (predicted_RC**2).sum(axis=1)
        scale_R = np.sqrt(target_spread_R * predicted_spread_R)
        return {"matthews_corrcoef": 100 * ratio(agreement_R, scale_R)}

    return correlation


def _of_labels(
    name: str, title: str, prepare: Prepare, labels: Literal["any", "needed", "two"]
) -> Metric:
    """A metric of one value, which is its name's."""
    return Metric(
        name,
        title,
        (name,),
        prepare,
        labels=labels,
        is_right=equals_target,
        is_invalid=outside_labels,
    )


ACCURACY = _of_labels(
    "accuracy", "share of predictions that equal their target to the character", _accuracy, "any"
)
F1 = _of_labels("f1", "F1 of the second of two labels", f1_of_second_label, "two")
MACRO_F1 = _of_labels(
    "macro_f1", "mean of every label's F1", partial(_macro_f1, "macro_f1"), "needed"
)
MEAN_3CLASS_F1 = _of_labels(
    "mean_3class_f1",
    "mean of three labels' F1 (CommitmentBank)",
    partial(_macro_f1, "mean_3class_f1"),
    "needed",
)
MATTHEWS = _of_labels(
    "matthews_corrcoef",
    "Matthews correlation; an invalid string is a class of its own",
    _matthews,
    "needed",
)
