"""ZeRO-3 for frozen blocks: DeepSpeed cuts, gathers and off-loads; a rank fills in its part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from softprompt_dist.backbone.traffic import Traffic

Fill = Callable[[int, int], torch.Tensor]
"""First and last byte of a range -> these bytes, uint8."""


class BlockSharder(deepspeed.zero.Init):
    """Makes a block's run of bytes a ZeRO-3 parameter of which this rank has filled its part.

    DeepSpeed's own way has rank 0 hold the whole tensor and send it to all. Here no rank holds it
    and nothing is sent. On the CPU the run's other bytes are never touched, and so take no memory.
    """

    def __init__(
        self, engine_config: dict[str, Any], traffic: Traffic, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__(
            config_dict_or_path=engine_config, dtype=torch.uint8, data_parallel_group=group
        )
        self._traffic = traffic

    def part_of(self, num_bytes: int) -> tuple[int, int]:
        """First and last byte of this rank's part of a run; empty where the run is shorter."""
        size = -(-num_bytes // self.dp_world_size)
        return min(num_bytes, self.rank * size), min(num_bytes, (self.rank + 1) * size)

    def shard(self, num_bytes: int, fill: Fill) -> nn.Parameter:
        """A parameter of `num_bytes` bytes; this rank's part is `fill(first, last)`."""
        run = torch.empty(num_bytes, dtype=torch.uint8, device=self.local_device)
        first, last = self.part_of(num_bytes)
        if first < last:
            run[first:last] = fill(first, last)
        parameter = nn.Parameter(run, requires_grad=False)
        self._convert_to_zero_parameters([parameter])
        return parameter

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        _count_gathers(param, self._traffic)
        param.partition()  # type: ignore[attr-defined]


def _count_gathers(parameter: Any, traffic: Traffic) -> None:
    gather_coalesced, gather = parameter.all_gather_coalesced, parameter.all_gather

    def counted_coalesced(parameters: Iterable[nn.Parameter], **options: Any) -> Any:
        chosen = list(parameters)
        traffic.add(chosen)
        return gather_coalesced(chosen, **options)

    def counted(param_list: list[nn.Parameter] | None = None, **options: Any) -> Any:
        traffic.add(param_list or [parameter])
        return gather(param_list, **options)

    parameter.all_gather_coalesced, parameter.all_gather = counted_coalesced, counted


def install_hooks(model: nn.Module, engine_config: dict[str, Any]) -> Any:
    """All ranks: let DeepSpeed bring sharded blocks in and out around their use; its engine.

    No optimizer is handed over: DeepSpeed then installs the hooks and nothing else, no gradient
    bucket either.
    """
    engine, *_ = deepspeed.initialize(model=model, config=engine_config)
    return engine
