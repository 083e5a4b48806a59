"""Whether the model with its activations fits, by the same arithmetic as `softprompt plan`."""

from __future__ import annotations

from pathlib import Path

import torch

from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.host_memory import node_bytes
from softprompt_dist.backbone.memory_model import check_memory, predict_memory
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job_files import read_config
from softprompt_dist.checks.machine import on_gpu
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import BackboneError, MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.node_memory import node_memory

_HOST_REMEDY = (
    "The ranks of this machine would be killed. Start fewer, lower batch.micro_batch_size, or hold "
    "the backbone in fewer bytes (`softprompt plan` shows what fits)."
)


def check_room(config: TuneConfig, folder: Path, cluster: Cluster) -> list[Finding]:
    """The predicted peak of a step against the memory of the GPU and of the host."""
    try:
        architecture = architecture_of(config.backbone.path, read_config(folder))
    except BackboneError as error:
        return [Finding("room", "ok", f"not predicted: {error}")]
    cell = Cell.of(config.backbone)
    workload = Workload(
        micro_batch=config.batch.micro_batch_size,
        prompt_length=config.prompt.prompt_length,
        input_length=config.backbone.max_input_tokens,
        dropout=config.backbone.dropout,
    )
    memory = predict_memory(architecture, cell, workload, cluster)
    on_host = node_bytes(architecture, cell, workload, cluster, on_gpu=on_gpu())
    if not on_gpu():
        return [host_finding(on_host, _HOST_REMEDY)]
    _, total = gpu_memory()
    remedy = ""
    try:
        check_memory(architecture, cell, workload, cluster, total)
    except MachineError as error:
        remedy = str(error)
    return [gpu_finding(memory.total, remedy), host_finding(on_host, _HOST_REMEDY)]


def gpu_memory() -> tuple[int, int]:
    """Bytes free and bytes in all, of this rank's GPU."""
    # Not of the others: asking would open them, too, and some sites allow one process each.
    free, total = torch.cuda.mem_get_info(ranks.device())
    return free, total


def host_memory() -> tuple[int, int]:
    """Bytes free and bytes in all, of what this job may use on this machine."""
    memory = node_memory()
    return memory.available, memory.total


def gpu_finding(needed: int, remedy: str) -> Finding:
    """Bytes that a step needs on this rank's GPU; `remedy` where it has not so many."""
    free, total = gpu_memory()
    if needed <= total:
        remedy = "Another process holds the rest; nvidia-smi names it."
    return _room("room on the GPU", needed, free, total, remedy)


def host_finding(needed: int, remedy: str) -> Finding:
    """Bytes that a step needs in this machine's memory; `remedy` where it has not so many."""
    free, total = host_memory()
    if needed <= total:
        remedy = "End other programs first."
    return _room("room on the host", needed, free, total, remedy)


def _room(name: str, needed: int, free: int, total: int, remedy: str) -> Finding:
    found = f"{needed / 1e9:.1f} GB predicted, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if needed <= free:
        return Finding(name, "ok", found)
    return Finding(name, "fail" if needed > total else "warn", found, remedy)
