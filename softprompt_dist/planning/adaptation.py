"""LM adaptation ahead of time: memory by ZeRO stage, the stage to take, operations and days."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cluster, Workload
from softprompt_dist.errors import ConfigError
from softprompt_dist.planning.adaptation_memory import (
    AdaptationMemory,
    Engine,
    Optimizer,
    host_memory_bytes,
    predict_adaptation_memory,
    saving_bytes,
)
from softprompt_dist.planning.machine import Gpu
from softprompt_dist.planning.work import training_operations

DEFAULT_MFU = 0.35
DEFAULT_TOKENS = 2**20
DEFAULT_STEPS = 100_000
PRESETS = {"paper-512-512": (512, 512), "paper-1024-256": (1024, 256)}
"""Recipes of LM adaptation and the lengths of their rows: encoder and decoder positions."""
_USUAL_MICRO_BATCH = 16
"""ZeRO-2 and 3 reduce all gradients after each micro-batch: few large ones hide it."""
_CAUSAL_POSITIONS = 1024
_MOST_GPUS = 4096


@dataclass(frozen=True)
class AdaptationQuestion:
    """What is to be planned."""

    architecture: Architecture
    gpu: Gpu
    cluster: Cluster
    input_length: int
    """Encoder positions of a row; 0 for a decoder-only model."""
    target_length: int
    micro_batch: int
    """Rows on a GPU at a time."""
    tokens_per_batch: int = DEFAULT_TOKENS
    steps: int = DEFAULT_STEPS
    mfu: float = DEFAULT_MFU
    optimizer: Optimizer = "adafactor"
    host_memory_gb: float | None = None
    """Of a node; None: not checked."""
    dropout: float = 0.0

    @property
    def device_bytes(self) -> float:
        """Memory of a GPU."""
        return self.gpu.memory_gb * 1e9

    @property
    def rows(self) -> int:
        """Of a global batch."""
        return rows_of(self.tokens_per_batch, self.input_length, self.target_length)

    @property
    def num_micro_batches(self) -> int:
        """Of a GPU in a step: gradient accumulation."""
        return self.rows // (self.micro_batch * self.cluster.num_gpus)

    @property
    def peak_tflops(self) -> float:
        """Of a GPU in the type that it computes in."""
        return self.gpu.bf16_tflops or self.gpu.fp32_tflops


@dataclass(frozen=True)
class AdaptationPlan:
    """One way to run and what it needs."""

    engine: Engine
    memory: AdaptationMemory
    host: int
    """Bytes of a node's memory: for off-loading, and `saving`."""
    saving: int
    """Bytes of a node's memory that checkpoints are written from in the background; 0 where there
    is no room for them, and training must wait for the disk."""
    fits: bool


@dataclass(frozen=True)
class Budget:
    """What all steps compute and how long it takes."""

    row_operations: float
    operations: float
    gpu_hours: float
    days: float


def row_lengths(
    architecture: Architecture, preset: str | None, inputs: int | None, targets: int | None
) -> tuple[int, int, str | None]:
    """Encoder and decoder positions of a row, and the preset that has them, if any.

    Raises:
        ConfigError: a preset together with lengths, or lengths that the model does not have.
    """
    if preset and (inputs or targets):
        raise ConfigError(
            f"--preset {preset} sets the lengths of rows. Leave out --input-length and "
            "--target-length, or --preset."
        )
    if architecture.family == "causal":
        if preset or inputs:
            given = f"--preset {preset}" if preset else f"--input-length {inputs}"
            raise ConfigError(
                f"{given}: {architecture.name} is decoder-only, and its rows have no encoder "
                "positions. Set --target-length only."
            )
        return 0, targets or _CAUSAL_POSITIONS, None
    if preset is None and not (inputs or targets):
        preset = next(iter(PRESETS))
    if preset:
        return (*PRESETS[preset], preset)
    inputs, targets = inputs or targets or 0, targets or inputs or 0
    same = (name for name, lengths in PRESETS.items() if lengths == (inputs, targets))
    return inputs, targets, next(same, None)


def rows_of(tokens_per_batch: int, input_length: int, target_length: int) -> int:
    """Rows of a batch as Mesh TensorFlow counts them: tokens over the longer side of a row."""
    return max(1, tokens_per_batch // max(input_length, target_length))


def usual_micro_batch(rows: int, num_gpus: int) -> int:
    """Rows on a GPU at a time where nothing else is asked for: they divide the batch evenly.

    Raises:
        ConfigError: the GPUs do not.
    """
    if rows % num_gpus:
        raise ConfigError(
            f"A batch of {rows} rows does not go evenly over {num_gpus} GPUs. Use a number of GPUs "
            f"that divides {rows}, or set --tokens-per-batch so that it makes "
            f"{max(1, rows // num_gpus) * num_gpus} rows."
        )
    share = rows // num_gpus
    return max(size for size in range(1, _USUAL_MICRO_BATCH + 1) if share % size == 0)


def check_micro_batch(rows: int, num_gpus: int, micro_batch: int) -> None:
    """Refuse micro-batches that do not make up the batch.

    Raises:
        ConfigError: they do not.
    """
    usual_micro_batch(rows, num_gpus)
    share = rows // num_gpus
    if share % micro_batch:
        nearest = max(size for size in range(1, micro_batch) if share % size == 0)
        raise ConfigError(
            f"--micro-batch {micro_batch} does not divide the {share} rows of a GPU in a step "
            f"({rows} rows over {num_gpus} GPUs). Use --micro-batch {nearest}."
        )


def adaptation_plans(question: AdaptationQuestion) -> list[AdaptationPlan]:
    """All ways in the order of preference, and DeepSpeed's default for stage 1, to compare."""
    return [make_adaptation_plan(question, engine) for engine in _engines(question)]


def _engines(question: AdaptationQuestion) -> Iterator[Engine]:
    """Little communication before much, and recomputing before gathering weights."""
    dtype: Literal["bf16", "fp32"] = "bf16" if question.gpu.bf16_tflops else "fp32"
    plain = Engine(0, dtype=dtype)
    several = question.cluster.num_gpus > 1
    stages = (0, 1, 2) if several else (0,)
    for checkpointing in (False, True):
        yield from (replace(plain, stage=s, checkpointing=checkpointing) for s in stages)
        if several and not checkpointing and dtype == "bf16":
            yield replace(plain, stage=1, sums="bf16")
    if several:
        yield replace(plain, stage=3)
        yield replace(plain, stage=3, checkpointing=True)
    yield replace(plain, stage=2, checkpointing=True, offload=True)
    yield replace(plain, stage=3, checkpointing=True, offload=True)


def make_adaptation_plan(question: AdaptationQuestion, engine: Engine) -> AdaptationPlan:
    """What one way needs."""
    architecture, cluster = question.architecture, question.cluster
    lengths = (question.input_length, question.target_length)
    work = Workload(question.micro_batch, 0, *lengths, question.dropout)
    memory = predict_adaptation_memory(architecture, engine, work, cluster, question.optimizer)
    host = host_memory_bytes(architecture, engine, cluster, question.optimizer)
    saving = saving_bytes(architecture, engine, cluster, question.optimizer)
    room = float("inf") if question.host_memory_gb is None else question.host_memory_gb * 1e9
    fits = memory.total <= question.device_bytes and host <= room
    if host + saving > room:
        saving = 0
    return AdaptationPlan(engine, memory, host + saving, saving, fits)


def choose_adaptation(plans: Sequence[AdaptationPlan]) -> AdaptationPlan | None:
    """The first that fits and adds gradients up in fp32; None if none does."""
    return next((plan for plan in plans if plan.fits and is_exact(plan.engine)), None)


def is_exact(engine: Engine) -> bool:
    """Whether the gradients of micro-batches are added up without losing small ones."""
    return engine.sums == "fp32"


def largest_adaptation_micro_batch(question: AdaptationQuestion, engine: Engine) -> int:
    """The most rows on a GPU at a time that fit and divide its share of a batch; 0 if none."""
    share = question.rows // question.cluster.num_gpus
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    for size in sizes:
        if make_adaptation_plan(replace(question, micro_batch=size), engine).fits:
            return size
    return 0


def with_micro_batch_that_fits(question: AdaptationQuestion) -> AdaptationQuestion:
    """The same with the largest micro-batch, this or a smaller one, that spares off-loading.

    If there is none, with the largest that fits at all.
    """
    share = question.rows // question.cluster.num_gpus
    offloaded: AdaptationQuestion | None = None
    for size in range(question.micro_batch, 0, -1):
        smaller = replace(question, micro_batch=size)
        chosen = choose_adaptation(adaptation_plans(smaller)) if share % size == 0 else None
        if chosen is not None and not chosen.engine.offload:
            return smaller
        if chosen is not None:
            offloaded = offloaded or smaller
    return offloaded or question


def fewest_adaptation_gpus(question: AdaptationQuestion) -> int | None:
    """GPUs of a node, a power of two times those asked about, with which something fits."""
    cluster = question.cluster
    gpus = cluster.gpus_per_node
    while (gpus := 2 * gpus) <= _MOST_GPUS:
        larger = replace(cluster, gpus_per_node=gpus)
        if question.rows % larger.num_gpus:
            return None
        micro_batch = min(question.micro_batch, usual_micro_batch(question.rows, larger.num_gpus))
        asked = replace(question, cluster=larger, micro_batch=micro_batch)
        if choose_adaptation(adaptation_plans(asked)):
            return gpus
    return None


def budget(question: AdaptationQuestion, rows: int | None = None) -> Budget:
    """Operations and time of all steps; `rows` instead of the question's own in a batch."""
    row = training_operations(
        question.architecture, 1, question.input_length, question.target_length
    )
    operations = row * (rows or question.rows) * question.steps
    hours = operations / (question.peak_tflops * 1e12 * question.mfu) / 3600
    return Budget(row, operations, hours, hours / question.cluster.num_gpus / 24)


def real_share(input_length: int, target_length: int) -> float:
    """Share of positions that hold tokens in T5's `prefix_lm` rows of long documents.

    A piece of input_length - 1 tokens is cut at a uniform place, both parts get an end, and the
    target is trimmed. Two such pieces never fit into one row.
    """
    piece = input_length - 1
    cuts = range(1, piece)
    if not cuts:
        return 1.0
    real = sum(cut + 1 + min(piece - cut, target_length - 1) + 1 for cut in cuts) / len(cuts)
    return real / (input_length + target_length)


def rows_of_pairs(question: AdaptationQuestion) -> int:
    """Rows without padding that carry as many real tokens, dealt evenly to the GPUs."""
    gpus = question.cluster.num_gpus
    rows = question.rows * real_share(question.input_length, question.target_length)
    return max(1, round(rows / gpus)) * gpus
