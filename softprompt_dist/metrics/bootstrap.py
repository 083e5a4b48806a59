"""Percentile bootstrap over whole groups of answers (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from softprompt_dist.metrics.metric import Floats

# A answers, G groups, R resamples
_ELEMENTS_AT_ONCE = 2**22
"""Bounds the memory of a share of the resamples to some tens of MB."""


def resampled_values(
    weighted: Callable[[Floats], Mapping[str, Floats]],
    group_of_A: NDArray[np.int64],
    num_resamples: int,
    seed: int,
) -> dict[str, Floats]:
    """Values of each resample, name -> [R]: groups are drawn with replacement, each as a whole."""
    shares = [weighted(weights_RA) for weights_RA in _weights(group_of_A, num_resamples, seed)]
    return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


def percentile_interval(values_R: Floats, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the values."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values_R, [tail, 100 - tail])
    return float(low), float(high)


def group_indices(names: Sequence[str]) -> NDArray[np.int64]:
    """The number of each name, [A], in the order in which names first appear."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _weights(group_of_A: NDArray[np.int64], num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each answer was drawn, weights_RA, a share of the resamples at a time."""
    generator = np.random.default_rng(seed)
    num_groups = int(group_of_A.max()) + 1
    share = max(1, _ELEMENTS_AT_ONCE // len(group_of_A))
    for start in range(0, num_resamples, share):
        size = min(share, num_resamples - start)
        drawn_RG = generator.integers(num_groups, size=(size, num_groups))
        drawn_RG += num_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn_RG.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups)[:, group_of_A].astype(np.float64)
