"""Bytes that LM adaptation takes on a GPU, in a node's memory and on a disk, by ZeRO stage.

N weights, D ranks. Weights are fp32 masters in every case: updates of a thousandth of a weight lie
below the resolution of bf16. The sizes of DeepSpeed's buffers are those of 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cluster, Workload
from softprompt_dist.planning.adaptation_activations import (
    AUTOCAST,
    BF16,
    FP32,
    Numbers,
    activation_bytes,
)

Optimizer = Literal["adafactor", "adamw", "rms_scaled_adamw"]

BUCKET_ELEMENTS = 200_000_000
"""Gradients that are reduced together; the ds_config says so."""
_SMALLEST_FACTORED_AXIS = 128
_FP32 = 4
_BF16 = 2
_MOMENTS = 2
_CONTEXT_BYTES = 600_000_000
_COMMUNICATOR_BYTES = 300_000_000
_FRAGMENTATION = 0.05
_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters` and `sub_group_size`."""
_PREFETCHED_ELEMENTS = 50_000_000
_ENGINE_BUCKET_ELEMENTS = 500_000_000
"""Reduced together where there is no ZeRO; not to be set."""


@dataclass(frozen=True)
class Engine:
    """How DeepSpeed spreads a training run over D ranks."""

    stage: int
    checkpointing: bool = False
    offload: bool = False
    """fp32 weights, gradient sums and optimizer in the node's memory."""
    sums: Literal["fp32", "bf16"] = "fp32"
    """What gradients of micro-batches are added up in (`grad_accum_dtype`)."""
    dtype: Literal["bf16", "fp32"] = "bf16"

    @property
    def numbers(self) -> Numbers:
        """Of the activations."""
        if self.dtype == "fp32":
            return FP32
        return BF16 if self.stage else AUTOCAST


@dataclass(frozen=True)
class AdaptationMemory:
    """Bytes on one GPU at the peak of a step."""

    weights: int
    copies: int
    """Casts of weights (stage 0 in bf16), or weights gathered for use (stage 3)."""
    gradients: int
    sums: int
    """fp32 sums of the gradients of several micro-batches."""
    masters: int
    """fp32 weights, where `weights` are bf16."""
    optimizer: int
    buckets: int
    """Gradients on their way to other ranks."""
    activations: int
    logits: int
    update: int
    """What an update needs beyond the room that activations and logits have left."""
    reserve: int
    """Context, communication buffers, fragmentation."""

    @property
    def states(self) -> int:
        """What stays from step to step: the part that ZeRO divides."""
        return self.weights + self.gradients + self.sums + self.masters + self.optimizer

    @property
    def total(self) -> int:
        """What the GPU must have."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict_adaptation_memory(
    architecture: Architecture,
    engine: Engine,
    work: Workload,
    cluster: Cluster,
    optimizer: Optimizer = "adafactor",
) -> AdaptationMemory:
    """Peak memory of a GPU in training all weights."""
    ranks = cluster.num_gpus
    states = _states(architecture, engine, ranks, optimizer)
    activations = activation_bytes(
        architecture, work, engine.numbers, checkpointing=engine.checkpointing
    )
    logits = _logit_bytes(architecture, work, engine)
    buckets = _bucket_bytes(architecture, engine, ranks)
    copies = _copied_bytes(architecture, engine)
    update = max(0, _update_bytes(architecture, engine, ranks) - activations - logits)
    moving = activations + logits + buckets + copies + update
    communicator = _COMMUNICATOR_BYTES if ranks > 1 else 0
    return AdaptationMemory(
        **states,
        copies=copies,
        buckets=buckets,
        activations=activations,
        logits=logits,
        update=update,
        reserve=_CONTEXT_BYTES + communicator + round(_FRAGMENTATION * moving),
    )


def _states(
    architecture: Architecture, engine: Engine, ranks: int, optimizer: Optimizer
) -> dict[str, int]:
    """What stays on a GPU from step to step."""
    whole = architecture.num_parameters
    part = -(-whole // ranks)
    item = engine.numbers.stream
    stage = engine.stage
    has_sums = engine.sums == "fp32" and item < _FP32
    sums = _FP32 * (part if stage > 1 else whole) if has_sums else 0
    # Where sums are fp32, bf16 gradients live in the buckets only.
    gradients = 0 if has_sums else item * (part if stage > 1 else whole)
    # ZeRO-3 in fp32 updates its weights themselves; 1 and 2 update a copy of their part.
    masters = 0 if stage == 0 or (stage == 3 and item == _FP32) else _FP32 * part
    state = optimizer_bytes(architecture, optimizer)
    if stage > 0 and optimizer != "adafactor":
        state = -(-state // ranks)
    if engine.offload:
        gradients = sums = masters = state = 0
    return {
        "weights": item * (part if stage == 3 else whole),
        "gradients": gradients,
        "sums": sums,
        "masters": masters,
        "optimizer": state,
    }


def _copied_bytes(architecture: Architecture, engine: Engine) -> int:
    whole = architecture.num_parameters
    if engine.stage == 3:
        return engine.numbers.stream * min(whole, _LIVE_ELEMENTS + _PREFETCHED_ELEMENTS)
    # autocast keeps each weight it has cast until the backward pass.
    return _BF16 * whole if engine.numbers.casts else 0


def _bucket_bytes(architecture: Architecture, engine: Engine, ranks: int) -> int:
    """Two for ZeRO's reduction beside the backward pass; BF16_Optimizer reduces in place."""
    if ranks == 1 or engine.stage == 0 or (engine.stage == 1 and engine.sums == "fp32"):
        return 0
    return 2 * engine.numbers.stream * bucket_elements(architecture)


def _update_bytes(architecture: Architecture, engine: Engine, ranks: int) -> int:
    """The transient fp32 gradient, or stage 0's all-reduce."""
    whole = architecture.num_parameters
    part = -(-whole // ranks)
    if engine.stage == 0:
        return _FP32 * min(whole, _ENGINE_BUCKET_ELEMENTS) if ranks > 1 else 0
    if engine.offload:
        return engine.numbers.stream * part
    if engine.stage == 3:
        return _FP32 * min(part, _LIVE_ELEMENTS)
    in_place = engine.sums == "fp32" and engine.dtype == "bf16"
    return 0 if in_place else _FP32 * part


def _logit_bytes(architecture: Architecture, work: Workload, engine: Engine) -> int:
    count = work.micro_batch * work.target_length * architecture.vocabulary_size
    # Logits, then in fp32 the logits, their exponentials and two gradients.
    return count * (engine.numbers.product + 4 * _FP32)


def bucket_elements(architecture: Architecture) -> int:
    """Gradients in a bucket; no more than there are."""
    return min(BUCKET_ELEMENTS, architecture.num_parameters)


def optimizer_bytes(architecture: Architecture, optimizer: Optimizer) -> int:
    """State of the optimizer for all weights."""
    if optimizer == "adafactor":
        return _FP32 * num_statistics(architecture)
    return _FP32 * _MOMENTS * architecture.num_parameters


def num_statistics(architecture: Architecture) -> int:
    """Numbers that Adafactor keeps: a row and a column for each matrix, else one per weight."""
    factored = sum(
        rows + columns if min(rows, columns) >= _SMALLEST_FACTORED_AXIS else rows * columns
        for rows, columns in matrix_shapes(architecture)
    )
    return factored + architecture.small_size


def matrix_shapes(architecture: Architecture) -> Iterator[tuple[int, int]]:
    """Rows and columns of all weights that are multiplied, and of the embedding."""
    yield architecture.vocabulary_size, architecture.d_model
    blocks = list(architecture.blocks())
    for block in blocks[:-1] if architecture.tied_head else blocks:
        yield from ((matrix.num_rows, matrix.num_columns) for matrix in block)


def host_memory_bytes(
    architecture: Architecture, engine: Engine, cluster: Cluster, optimizer: Optimizer
) -> int:
    """Memory of a node that off-loading takes: its ranks' parts."""
    if not engine.offload:
        return 0
    whole = architecture.num_parameters
    # fp32 weights and gradients; page-locked sums of micro-batches and bf16 weights on their way.
    state = 4 * _FP32 * whole if optimizer != "adafactor" else 2 * _FP32 * whole
    state += optimizer_bytes(architecture, optimizer) if optimizer == "adafactor" else 0
    return round((state + 4 * whole) * cluster.gpus_per_node / cluster.num_gpus)


def saving_bytes(
    architecture: Architecture, engine: Engine, cluster: Cluster, optimizer: Optimizer
) -> int:
    """Memory of a node that checkpoints are written from in the background: its ranks' parts."""
    whole = checkpoint_bytes(architecture, optimizer)
    if engine.stage == 0:
        return whole  # rank 0 has everything, and copies it
    return round(whole * cluster.gpus_per_node / cluster.num_gpus)


def checkpoint_bytes(architecture: Architecture, optimizer: Optimizer) -> int:
    """On the disk: fp32 weights and the optimizer's state."""
    return _FP32 * architecture.num_parameters + optimizer_bytes(architecture, optimizer)


def export_bytes(architecture: Architecture) -> dict[str, int]:
    """On the disk, by dtype."""
    return {
        "fp32": _FP32 * architecture.num_parameters,
        "bf16": _BF16 * architecture.num_parameters,
    }
