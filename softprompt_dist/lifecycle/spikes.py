"""Loss spikes: a loss far above what the latest ones were, before it has become a NaN."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

SPIKE = "loss_spike_sigmas"
"""Among the metrics of a step whose loss is one."""
_FEWEST = 16
"""Losses that a standard deviation is taken of."""


class LossMonitor:
    """Looks at each loss beside the `window` before it (the numbers of OLMo-core: 128, 6 sigma)."""

    def __init__(self, window: int, sigmas: float, losses: Iterable[float] = ()) -> None:
        self._losses = deque[float](maxlen=window)
        self._sigmas = sigmas
        for loss in losses:  # of an earlier attempt: judged as it judged them
            self.observe(loss)

    def observe(self, loss: float) -> float | None:
        """How many standard deviations a spike is above the mean; None for any other loss.

        A spike does not enter the window: it would hide the next one.
        """
        above = self._standard_deviations(loss)
        if above is not None and above > self._sigmas:
            return above
        self._losses.append(loss)
        return None

    def _standard_deviations(self, loss: float) -> float | None:
        if len(self._losses) < _FEWEST:
            return None
        deviation = statistics.pstdev(self._losses)
        excess = loss - statistics.fmean(self._losses)
        return excess / deviation if deviation else None
