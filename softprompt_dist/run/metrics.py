"""Scores of predictions, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z_95 = 1.959963984540054


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Share of predictions equal to their target, in [0, 1].

    Raises:
        ValueError: the lengths differ or are 0.
    """
    if len(predictions) != len(targets) or not targets:
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets.")
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy of `correct` out of `total` (Wilson 1927).

    Raises:
        ValueError: not 0 <= correct <= total, or total is 0.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} correct out of {total} is impossible.")
    share, z2 = correct / total, _Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    variance = share * (1 - share) / total + z2 / (4 * total**2)
    half = _Z_95 * math.sqrt(variance) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)
