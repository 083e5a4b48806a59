"""Whether a run fits into memory, said before its weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.host_memory import node_bytes
from softprompt_dist.backbone.memory_model import check_memory
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import BackboneError, MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import local_world_size
from softprompt_dist.parallel.node_memory import node_memory

if TYPE_CHECKING:
    from softprompt_dist.run.loaded_task import LoadedTask


def assert_room(config: TuneConfig, folder: Path, tasks: Sequence[LoadedTask]) -> None:
    """Refuse a device or a machine without room for the backbone and the longest examples.

    Raises:
        MachineError: with what is predicted, and what there is.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        architecture = architecture_of(config.backbone.path, raw)
    except BackboneError:
        return  # not every architecture that can be loaded can be predicted
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
    gpus_per_node = local_world_size(os.environ) if ranks.world_size() > 1 else 1
    cluster = Cluster(gpus_per_node, ranks.world_size() // gpus_per_node)
    cell, on_gpu = Cell.of(config.backbone), ranks.device().type == "cuda"
    if on_gpu:
        total = int(torch.cuda.get_device_properties(ranks.device()).total_memory)
        check_memory(architecture, cell, workload, cluster, total)
    needed = node_bytes(architecture, cell, workload, cluster, on_gpu=on_gpu)
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


def _rows(config: TuneConfig, length: int) -> int:
    """Rows of the longest examples in a micro-batch."""
    budget = config.batch.micro_batch_tokens
    if budget is None:
        return config.batch.micro_batch_size
    return max(1, budget // (config.prompt.prompt_length + length))
