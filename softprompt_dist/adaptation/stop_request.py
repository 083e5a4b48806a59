"""A cluster's warning that it will end the run."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from softprompt_dist.parallel import ranks


class StopRequest:
    """Inside its `with`, a SIGTERM (a cluster's warning) is remembered until the update is done."""

    def __init__(self) -> None:
        self._wanted = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        """Begin to remember."""
        self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the signal do again what it did before."""
        signal.signal(signal.SIGTERM, self._previous)

    def agreed(self) -> bool:
        """All ranks: whether any of them was asked to stop."""
        return bool(ranks.all_reduce_max(torch.tensor(int(self._wanted), device=ranks.device())))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
