"""Whether a run fits into memory, said before its weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from softprompt_dist.backbone.architecture import Architecture, architecture_of
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.host_memory import node_bytes
from softprompt_dist.backbone.memory_model import check_memory
from softprompt_dist.backbone.scoring_memory import position_bytes, scoring_positions
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import BackboneError, MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import local_world_size
from softprompt_dist.parallel.node_memory import NodeMemory, node_memory

if TYPE_CHECKING:
    from softprompt_dist.run.loaded_task import LoadedTask


_USUAL_POSITIONS = 4096
"""Scored at a time on a CPU, and where memory cannot be predicted."""


def assert_room(config: TuneConfig, folder: Path, tasks: Sequence[LoadedTask]) -> None:
    """Refuse a device or a machine without room for the backbone and the longest examples.

    Raises:
        MachineError: with what is predicted, and what there is.
    """
    architecture = _architecture(config, folder)
    if architecture is None:
        return
    tokens = [split.tokens for task in tasks for split in task.splits.values()]
    input_length = max(int(table.input_lengths.max()) for table in tokens)
    target_length = max(int(table.target_lengths.max()) for table in tokens)
    workload = Workload(
        micro_batch=_rows(config, input_length + target_length),
        prompt_length=config.prompt.prompt_length,
        input_length=input_length,
        target_length=target_length,
        dropout=config.backbone.dropout,
    )
    cell, cluster, device = Cell.of(config.backbone), _cluster(), device_memory()
    if device is not None:
        check_memory(architecture, cell, workload, cluster, device.total)
    needed = node_bytes(architecture, cell, workload, cluster, on_gpu=device is not None)
    memory = node_memory()
    if needed > memory.total:
        raise MachineError(
            f"{architecture.name} ({cell.sharding}, {cell.dtype}, quantization "
            f"{cell.quantization}, offload {cell.offload}, micro-batch {workload.micro_batch}) "
            f"needs {needed / 1e9:.1f} GB of memory for {cluster.gpus_per_node} rank(s) on "
            f"{memory.whose}, which has {memory.total / 1e9:.1f} GB. Start fewer ranks, lower "
            "batch.micro_batch_size, or hold the backbone in fewer bytes (`softprompt plan` shows "
            "what fits)."
        )


def scoring_budget(config: TuneConfig, folder: Path) -> int:
    """All ranks: positions that each scores at a time, the same on all of them.

    Where the recipe leaves it open it follows the smallest device. No prediction depends on it, but
    for rounding; so it comes from what the device has and the backbone takes, which is the same in
    every run on such devices, unless another program holds what would be needed.
    """
    if config.evaluation.batch_tokens is not None:
        return config.evaluation.batch_tokens
    return min(ranks.gather_objects(_own_scoring_budget(config, folder)))


def _own_scoring_budget(config: TuneConfig, folder: Path) -> int:
    device, architecture = device_memory(), _architecture(config, folder)
    if device is None or architecture is None:
        return _USUAL_POSITIONS
    workload = Workload(1, config.prompt.prompt_length, config.backbone.max_input_tokens)
    cell, cluster = Cell.of(config.backbone), _cluster()
    planned = scoring_positions(architecture, cell, workload, cluster, device.total)
    there = device.available // position_bytes(architecture, cell, workload)
    return max(1, min(planned, there))


def device_memory() -> NodeMemory | None:
    """Bytes of this rank's GPU, and those that this process can have now; None on a CPU."""
    device = ranks.device()
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return NodeMemory(free + unused, total)


def _architecture(config: TuneConfig, folder: Path) -> Architecture | None:
    """None where its memory cannot be predicted: more can be loaded than is planned for."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return architecture_of(config.backbone.path, raw)
    except BackboneError:
        return None


def _cluster() -> Cluster:
    gpus_per_node = local_world_size(os.environ) if ranks.world_size() > 1 else 1
    return Cluster(gpus_per_node, ranks.world_size() // gpus_per_node)


def _rows(config: TuneConfig, length: int) -> int:
    """Rows of the longest examples in a micro-batch."""
    budget = config.batch.micro_batch_tokens
    if budget is None:
        return config.batch.micro_batch_size
    return max(1, budget // (config.prompt.prompt_length + length))
