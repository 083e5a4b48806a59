"""The rank that the others wait for.

Each rank measures how long it takes until it meets the others. Where weights are gathered layer by
layer all ranks are as slow as the slowest, so what can be told apart there is what comes before the
first gather: data and host. `softprompt doctor` compares the devices themselves.
"""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass

import torch

from softprompt_dist.parallel import ranks

_STEPS = 10
"""Whose sum is compared."""
_LEAST_SECONDS = 0.02
"""A step: what takes less is noise, whatever the ratio."""


@dataclass(frozen=True)
class Straggler:
    """A rank, its machine, and how many times as long as the median rank it takes."""

    rank: int
    host: str
    ratio: float
    seconds: float
    """More than the median rank, of a step."""


class StragglerMonitor:
    """All ranks make one, and use it alike in every step."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._hosts = ranks.gather_objects(socket.gethostname())
        self._begun = 0.0
        self._seconds = 0.0
        self._steps = 0

    @property
    def has_compared(self) -> bool:
        """Whether the latest `end` was one of those that compare the ranks."""
        return self._steps == 0

    def begin(self) -> None:
        """This rank begins a step."""
        self._begun = time.perf_counter()

    def arrive(self) -> None:
        """This rank has done what it does alone, and waits for the others from now on."""
        if ranks.device().type == "cuda":
            torch.cuda.synchronize()  # the next thing done is to wait for the device, anyway
        self._seconds += time.perf_counter() - self._begun

    def end(self) -> Straggler | None:
        """All ranks: whether one rank was much slower than the others in the latest steps."""
        self._steps += 1
        if self._steps < _STEPS:
            return None
        seconds = torch.zeros(ranks.world_size(), dtype=torch.float64, device=ranks.device())
        seconds[ranks.rank()] = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        return self._slowest(ranks.all_reduce_sum(seconds).tolist())

    def _slowest(self, seconds: list[float]) -> Straggler | None:
        usual = statistics.median_low(seconds)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        excess = seconds[slowest] - usual
        ratio = seconds[slowest] / max(usual, 1e-9)
        if ratio < self._ratio or excess < _LEAST_SECONDS:
            return None
        return Straggler(slowest, self._hosts[slowest], ratio, excess)
