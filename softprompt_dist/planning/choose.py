"""All ways to hold a backbone, what each would need and take, and the best that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Workload
from softprompt_dist.backbone.host_memory import host_bytes
from softprompt_dist.backbone.memory_model import Memory, predict_memory
from softprompt_dist.backbone.scoring_memory import scoring_positions
from softprompt_dist.planning.machine import Machine
from softprompt_dist.planning.timing import Step, estimate_answer, estimate_loading, estimate_step
from softprompt_dist.planning.work import gather_bytes, offload_bytes, reduce_bytes

_AS_FAST = 1.05
"""Estimates closer than this are equal: then the cell that is listed first is taken."""
_LIBRARY_CELLS = ("llm_int8", "nf4")
"""Taken only where nothing else fits: another library, and 4 bits cost accuracy."""
_LEAST_RECOMPUTING_FIRST = ("every_8", "every_4", "every_3", "every_2", "full")
_MOST_GPUS = 1024
DEFAULT_DROPOUT = 0.1
"""Of the packaged recipes for T5, which costs memory; decoder-only models take no more for it."""


@dataclass(frozen=True)
class Plan:
    """One cell and its predictions; bytes and seconds."""

    cell: Cell
    memory: Memory
    host: int
    """Memory of a node."""
    received: float
    """By a device in a step: gathers and the prompt's all-reduce."""
    offloaded: float
    """Copied to a device in a step from the node's memory or disk."""
    step: Step
    loading: float
    """From the published checkpoint."""
    loading_converted: float
    """From a copy that `softprompt convert` wrote."""
    fits: bool


@dataclass(frozen=True)
class Question:
    """What is to be planned."""

    architecture: Architecture
    workload: Workload
    machine: Machine
    device_bytes: float
    quantized_layers: Literal["blocks", "blocks_without_wo"] = "blocks"
    has_nvme: bool = False
    """Whether there is a folder for off-loading to disk."""


def all_plans(question: Question) -> list[Plan]:
    """Every cell, the simplest first, and what must be recomputed for those that do not fit."""
    return [
        plan for cell in candidate_cells(question) for plan in _with_recomputing(question, cell)
    ]


def _with_recomputing(question: Question, cell: Cell) -> list[Plan]:
    """The cell as it is; if it does not fit, the least recomputing with which it does."""
    plain = make_plan(question, cell)
    if plain.fits:
        return [plain]
    for checkpointing in _LEAST_RECOMPUTING_FIRST:
        plan = make_plan(question, replace(cell, activation_checkpointing=checkpointing))
        if plan.fits:
            return [plain, plan]
    return [plan]


def candidate_cells(question: Question) -> Iterator[Cell]:
    """The cells that exist on this machine, without activation checkpointing."""
    layers = question.quantized_layers
    has_bf16 = question.machine.gpu.bf16_tflops is not None
    dtype: Literal["fp32", "bf16"] = "bf16" if has_bf16 else "fp32"
    own = [Cell(dtype=dtype), Cell(dtype=dtype, quantization="int8", quantized_layers=layers)]
    whole = [Cell()] if has_bf16 else []
    yield from own
    yield Cell(dtype=dtype, quantization="llm_int8", quantized_layers=layers)
    yield Cell(dtype=dtype, quantization="nf4", quantized_layers=layers)
    yield from whole
    cluster = question.machine.cluster
    if cluster.nodes > 1 and cluster.gpus_per_node > 1:
        yield from (replace(c, sharding="zero3", shard_group="node") for c in own + whole)
    if cluster.num_gpus > 1:
        yield from (replace(c, sharding="zero3") for c in own + whole)
    yield from (replace(c, sharding="zero3", offload="cpu") for c in own)
    if question.has_nvme:
        yield from (replace(c, sharding="zero3", offload="nvme") for c in own)


def make_plan(question: Question, cell: Cell) -> Plan:
    """What one cell needs and takes."""
    architecture, workload = question.architecture, question.workload
    machine, cluster = question.machine, question.machine.cluster
    memory = predict_memory(architecture, cell, workload, cluster)
    host = host_bytes(architecture, cell, cluster)
    host_memory = machine.host_memory_gb
    return Plan(
        cell=cell,
        memory=memory,
        host=host,
        received=gather_bytes(architecture, cell, cluster)
        + reduce_bytes(architecture, workload, cluster),
        offloaded=offload_bytes(architecture, cell, cluster),
        step=estimate_step(architecture, cell, workload, machine),
        loading=estimate_loading(architecture, cell, machine, converted=False),
        loading_converted=estimate_loading(architecture, cell, machine, converted=True),
        fits=memory.total <= question.device_bytes
        and (host_memory is None or host <= host_memory * 1e9),
    )


def choose(plans: Sequence[Plan]) -> Plan | None:
    """The fastest that fits; None if none does."""
    fitting = [plan for plan in plans if plan.fits]
    own = [plan for plan in fitting if plan.cell.quantization not in _LIBRARY_CELLS]
    fitting = own or fitting
    if not fitting:
        return None
    fastest = min(plan.step.total for plan in fitting)
    return next(plan for plan in fitting if plan.step.total <= fastest * _AS_FAST)


def largest_micro_batch(question: Question, cell: Cell) -> int:
    """The most rows at a time with which the cell still fits; 0 if not even one."""

    def fits(micro_batch: int) -> bool:
        workload = replace(question.workload, micro_batch=micro_batch)
        return make_plan(replace(question, workload=workload), cell).fits

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def scoring_of(question: Question, cell: Cell) -> tuple[int, float]:
    """Positions that a device scores at a time, and seconds for one row on all devices."""
    architecture, workload, machine = question.architecture, question.workload, question.machine
    positions = scoring_positions(
        architecture, cell, workload, machine.cluster, question.device_bytes
    )
    return positions, estimate_answer(architecture, cell, workload, machine, positions)


def fewest_gpus(question: Question) -> int | None:
    """Devices of a node, a power of two times those asked about, with which something fits."""
    machine = question.machine
    gpus = machine.cluster.gpus_per_node
    while (gpus := 2 * gpus) <= _MOST_GPUS:
        cluster = replace(machine.cluster, gpus_per_node=gpus)
        if choose(all_plans(replace(question, machine=replace(machine, cluster=cluster)))):
            return gpus
    return None
