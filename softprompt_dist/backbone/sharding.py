"""ZeRO-3 for frozen blocks: DeepSpeed cuts, gathers and off-loads; a rank fills in its part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from torch import nn

from softprompt_dist.backbone.flat_weights import ALIGNMENT
from softprompt_dist.backbone.gather_limit import GatherLimit
from softprompt_dist.backbone.offload import claim_folder
from softprompt_dist.backbone.traffic import Traffic
from softprompt_dist.parallel.host_memory import pin_exactly

Fill = Callable[[torch.Tensor, int], None]
"""Writes the bytes from a first one on into a tensor."""


def run_bytes(num_bytes: int, num_parts: int) -> int:
    """`num_bytes` rounded up, so that all parts are equal and start at aligned addresses."""
    unit = num_parts * ALIGNMENT
    return -(-num_bytes // unit) * unit


class BlockSharder(deepspeed.zero.Init):
    """Makes a block's run of bytes a ZeRO-3 parameter of which this rank has filled its part.

    DeepSpeed's own way has rank 0 hold the whole tensor and send it to all. Here no rank holds it
    and nothing is sent. On the CPU the run's other bytes are never touched, and so take no memory.
    """

    def __init__(
        self, engine_config: dict[str, Any], traffic: Traffic, group: dist.ProcessGroup | None
    ) -> None:
        if engine_config["zero_optimization"].get("offload_param"):
            pin_exactly()
        # DeepSpeed has a type for a model, a floating-point one; only its way to the disk heeds it.
        super().__init__(
            config_dict_or_path=engine_config,
            data_parallel_group=group,
            param_swapper=_disk_of_bytes(engine_config),
        )
        self._traffic = traffic
        self._limit = GatherLimit()

    def shard(self, num_bytes: int, fill: Fill) -> nn.Parameter:
        """A parameter of `num_bytes` (or a few more) of which `fill` writes this rank's part."""
        whole = run_bytes(num_bytes, self.dp_world_size)
        size = whole // self.dp_world_size
        run = torch.empty(whole, dtype=torch.uint8, device=self.local_device)
        fill(run[self.rank * size : (self.rank + 1) * size], self.rank * size)
        parameter = nn.Parameter(run, requires_grad=False)
        self._convert_to_zero_parameters([parameter])
        return parameter

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()  # type: ignore[attr-defined]
        _watch(param, self._traffic, self._limit)


def _disk_of_bytes(engine_config: dict[str, Any]) -> AsyncPartitionedParameterSwapper | None:
    """What moves parts to the disk and back as the bytes they are, where the config asks for it."""
    offload = engine_config["zero_optimization"].get("offload_param") or {}
    if offload.get("device") != "nvme":
        return None
    offload["nvme_path"] = str(claim_folder(Path(offload["nvme_path"])))
    return AsyncPartitionedParameterSwapper(DeepSpeedConfig(engine_config), torch.uint8)


def _watch(parameter: Any, traffic: Traffic, limit: GatherLimit) -> None:
    """Count a parameter's gathers, and keep them from running too far ahead."""
    gather_coalesced, gather = parameter.all_gather_coalesced, parameter.all_gather
    partition = parameter.partition

    def watched_coalesced(parameters: Iterable[nn.Parameter], **options: Any) -> Any:
        chosen = list(parameters)
        limit.wait()
        traffic.add(chosen)
        return gather_coalesced(chosen, **options)

    def watched(param_list: list[nn.Parameter] | None = None, **options: Any) -> Any:
        limit.wait()
        traffic.add(param_list or [parameter])
        return gather(param_list, **options)

    def released(*arguments: Any, **options: Any) -> None:
        partition(*arguments, **options)
        limit.note_release()

    parameter.all_gather_coalesced, parameter.all_gather = watched_coalesced, watched
    parameter.partition = released


def install_hooks(model: nn.Module, engine_config: dict[str, Any]) -> Any:
    """All ranks: let DeepSpeed bring sharded blocks in and out around their use; its engine.

    No optimizer is handed over: DeepSpeed then installs the hooks and nothing else, no gradient
    bucket either.
    """
    engine, *_ = deepspeed.initialize(model=model, config=engine_config)
    return engine
