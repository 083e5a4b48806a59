"""Whether a run fits into memory, said before its weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.memory_model import check_memory
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import BackboneError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import local_world_size

if TYPE_CHECKING:
    from softprompt_dist.run.tuning import Split


def assert_room(config: TuneConfig, folder: Path, splits: Mapping[str, Split]) -> None:
    """Refuse a device that cannot hold the backbone and a micro-batch of the longest examples.

    Raises:
        MachineError: with the predicted parts, and what the device has.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        architecture = architecture_of(config.backbone.path, raw)
    except BackboneError:
        return  # not every architecture that can be loaded can be predicted
    examples = [example for split in splits.values() for example in split.tokens]
    workload = Workload(
        micro_batch=config.batch.micro_batch_size,
        prompt_length=config.prompt.prompt_length,
        input_length=max(len(example.input_ids) for example in examples),
        target_length=max(len(example.target_ids) for example in examples),
    )
    gpus_per_node = local_world_size(os.environ) if ranks.world_size() > 1 else 1
    cluster = Cluster(gpus_per_node, ranks.world_size() // gpus_per_node)
    check_memory(architecture, Cell.of(config.backbone), workload, cluster, _device_bytes(cluster))


def _device_bytes(cluster: Cluster) -> int:
    """Memory of this rank's GPU, or its share of the machine's."""
    if ranks.device().type == "cuda":
        return int(torch.cuda.get_device_properties(ranks.device()).total_memory)
    return int(psutil.virtual_memory().total) // cluster.gpus_per_node
