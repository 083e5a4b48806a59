"""Bytes that cross between ranks to bring sharded weights in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Traffic:
    """What this rank has received from others since the run began."""

    gathered_bytes: int = 0
    num_gathers: int = 0

    def add(self, parameters: Iterable[Any]) -> None:
        """Count one gather of these ZeRO-3 parameters: the parts of all ranks but this one."""
        for parameter in parameters:
            others = parameter.ds_zero_partition_world_size - 1
            self.gathered_bytes += parameter.ds_tensor.ds_numel * others
            self.num_gathers += others > 0
