"""Correlation of numbers that were written as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.metric import Floats, Metric, Weighted, ratio

# A answers, R resamples, V different values
_UNREADABLE = -1.0


def string_to_float(text: str) -> float:
    """The number that `text` writes, else -1 (T5's `string_to_float`); also for nan and inf."""
    try:
        number = float(text)
    except ValueError:
        return _UNREADABLE
    return number if math.isfinite(number) else _UNREADABLE


def mid_ranks(values_A: Floats, weights_RA: Floats) -> Floats:
    """Ranks from 1, [R, A], of a sample that holds each value `weights` times; ties share a mean.

    What a value has that is not in the sample means nothing.
    """
    order_A = np.argsort(values_A, kind="stable")
    _, first_V, value_of_A = np.unique(values_A[order_A], return_index=True, return_inverse=True)
    count_RV = np.add.reduceat(weights_RA[:, order_A], first_V, axis=1)
    rank_RV = np.cumsum(count_RV, axis=1) - (count_RV - 1) / 2
    rank_RA = np.empty_like(weights_RA)
    rank_RA[:, order_A] = rank_RV[:, value_of_A]
    return rank_RA


def weighted_pearson(x_RA: Floats, y_RA: Floats, weights_RA: Floats) -> Floats:
    """Pearson's correlation, [R]; 0 where x or y is constant (scipy gives NaN)."""
    total_R1 = weights_RA.sum(axis=1, keepdims=True)
    dx_RA = x_RA - (weights_RA * x_RA).sum(axis=1, keepdims=True) / total_R1
    dy_RA = y_RA - (weights_RA * y_RA).sum(axis=1, keepdims=True) / total_R1
    product_R = (weights_RA * dx_RA * dy_RA).sum(axis=1)
    length_R = _length(x_RA, dx_RA, weights_RA) * _length(y_RA, dy_RA, weights_RA)
    return np.clip(ratio(product_R, length_R), -1.0, 1.0)


def _length(x_RA: Floats, dx_RA: Floats, weights_RA: Floats) -> Floats:
    """Root of the weighted sum of squares; 0 where it is what rounding left of a constant."""
    length_R: Floats = np.sqrt((weights_RA * dx_RA**2).sum(axis=1))
    rounding_R = 1e-13 * np.sqrt((weights_RA * x_RA**2).sum(axis=1))
    return np.where(length_R > rounding_R, length_R, 0.0)


def _is_unreadable(answer: Answer, _: Sequence[str]) -> bool:
    return string_to_float(answer.prediction) == _UNREADABLE


def _numbers(answers: Sequence[Answer]) -> tuple[Floats, Floats]:
    targets_A = np.array([string_to_float(answer.target) for answer in answers])
    return targets_A, np.array([string_to_float(answer.prediction) for answer in answers])


def _pearson(answers: Sequence[Answer], _: Sequence[str]) -> Weighted:
    targets_A, predictions_A = _numbers(answers)

    def correlation(weights_RA: Floats) -> Mapping[str, Floats]:
        values_R = weighted_pearson(targets_A[None], predictions_A[None], weights_RA)
        return {"pearson_corrcoef": 100 * values_R}

    return correlation


def _spearman(answers: Sequence[Answer], _: Sequence[str]) -> Weighted:
    targets_A, predictions_A = _numbers(answers)

    def correlation(weights_RA: Floats) -> Mapping[str, Floats]:
        values_R = weighted_pearson(
            mid_ranks(targets_A, weights_RA), mid_ranks(predictions_A, weights_RA), weights_RA
        )
        return {"spearman_corrcoef": 100 * values_R}

    return correlation


PEARSON = Metric(
    "pearson_corrcoef",
    "Pearson correlation of the numbers written",
    ("pearson_corrcoef",),
    _pearson,
    is_invalid=_is_unreadable,
    answer_kind="number",
)
SPEARMAN = Metric(
    "spearman_corrcoef",
    "Spearman rank correlation of the numbers written",
    ("spearman_corrcoef",),
    _spearman,
    is_invalid=_is_unreadable,
    answer_kind="number",
)
