"""Whether LM adaptation fits memory and disk, by the same arithmetic as `softprompt plan`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.engine_config import gradient_sums
from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Workload
from softprompt_dist.checks import room
from softprompt_dist.checks.disk import nearest_existing
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.machine import on_gpu
from softprompt_dist.checks.world import World
from softprompt_dist.data.lm.objectives import random_spans_helper
from softprompt_dist.planning.adaptation import is_exact
from softprompt_dist.planning.adaptation_memory import (
    Engine,
    checkpoint_bytes,
    export_bytes,
    host_memory_bytes,
    predict_adaptation_memory,
    saving_bytes,
)
from softprompt_dist.run.directory import RunDirectory

_HOST_REMEDY = (
    "The ranks of this machine would be killed. Start fewer here, lower batch.micro_batch_size, or "
    "set engine.activation_checkpointing=true or checkpoint.background=false."
)


def engine_of(config: AdaptConfig, ds_config: dict[str, Any] | None) -> Engine:
    """How the recipe, with its ds_config applied, spreads a model, as the planner has it."""
    own = config.engine
    return Engine(
        own.zero_stage,
        checkpointing=own.activation_checkpointing,
        offload=own.offload_optimizer == "cpu",
        sums=gradient_sums(config, ds_config),
        dtype=config.dtype,
    )


def check_engine(config: AdaptConfig, engine: Engine, world: World) -> Finding:
    """Whether an update adds gradients up exactly."""
    found = f"ZeRO-{engine.stage}, {engine.dtype}, gradients added up in {engine.sums}"
    found += ", activation checkpointing" if engine.checkpointing else ""
    found += ", optimizer in the node's memory" if engine.offload else ""
    several = config.batch.global_batch_size > config.batch.micro_batch_size * world.size
    if is_exact(engine) or not several:
        return Finding("engine", "ok", found)
    remedy = (
        "Sums of many micro-batches lose what the later ones add. Take ZeRO stage 2, or set "
        'data_types.grad_accum_dtype to "fp32" in a ds_config.'
    )
    return Finding("engine", "warn", found, remedy)


def check_memory_room(
    config: AdaptConfig, engine: Engine, architecture: Architecture | None, world: World
) -> list[Finding]:
    """The predicted peak of a step against the memory of the GPU and of the host."""
    if architecture is None:
        return [Finding("room", "ok", "not predicted for this model")]
    inputs, targets = row_lengths(config)
    work = Workload(config.batch.micro_batch_size, 0, inputs, targets, config.dropout)
    cluster = world.cluster
    memory = predict_adaptation_memory(architecture, engine, work, cluster, config.optimizer)
    on_host = host_memory_bytes(architecture, engine, cluster, config.optimizer)
    if config.checkpoint.background:
        on_host += saving_bytes(architecture, engine, cluster, config.optimizer)
    if not on_gpu():
        on_host += world.local_size * (memory.total - memory.reserve)
        return [room.host_finding(on_host, _HOST_REMEDY)]
    found = room.gpu_finding(memory.total, _gpu_remedy(config, world))
    return [found, *([room.host_finding(on_host, _HOST_REMEDY)] if on_host else [])]


def check_disk_room(
    stages: Sequence[AdaptConfig], architecture: Architecture | None
) -> list[Finding]:
    """Checkpoints and exports that will be there at once, against what is free."""
    if architecture is None:
        return []
    needed = sum(max(0, _written(stage, architecture) - _is_there(stage)) for stage in stages)
    folder = nearest_existing(Path(str(stages[0].run_directory)))
    free = disk_free(folder)
    checkpoints, exports = sum(map(_num_checkpoints, stages)), sum(map(_num_exports, stages))
    found = (
        f"{checkpoints} checkpoint(s) and {exports} export(s) at most: {needed / 1e9:.1f} GB to be "
        f"written, {free / 1e9:.1f} GB free in {folder}"
    )
    if needed <= free:
        return [Finding("room on the disk", "ok", found)]
    remedy = (
        "A full disk would stop the run. Free some space, choose another --run-dir, or lower "
        "checkpoint.keep_last, export.steps or export.dtypes."
    )
    return [Finding("room on the disk", "fail", found, remedy)]


def disk_free(folder: Path) -> int:
    """Bytes."""
    return shutil.disk_usage(folder).free


def row_lengths(config: AdaptConfig) -> tuple[int, int]:
    """Encoder and decoder positions of a row."""
    if config.objective == "lm":
        return 0, config.targets_length
    if config.objective == "prefix_lm":
        return config.inputs_length, config.targets_length
    spans = random_spans_helper(
        config.inputs_length, config.noise_density, config.mean_noise_span_length
    )
    return config.inputs_length, spans.num_targets


def _gpu_remedy(config: AdaptConfig, world: World) -> str:
    model = f" --model {config.backbone}" if config.backbone else ""
    return (
        "Lower batch.micro_batch_size, set engine.activation_checkpointing=true or raise "
        f"engine.zero_stage. `softprompt plan --stage adapt{model} --gpus {world.local_size}` with "
        "the memory of a GPU in GB as --gpu-memory shows what fits."
    )


def _written(config: AdaptConfig, architecture: Architecture) -> int:
    sizes = export_bytes(architecture)
    exports = sum(sizes[dtype] for dtype in dict.fromkeys(config.export.dtypes))
    checkpoint = checkpoint_bytes(architecture, config.optimizer)
    return _num_checkpoints(config) * checkpoint + len(_export_steps(config)) * exports


def _num_checkpoints(config: AdaptConfig) -> int:
    """There at once: those that are kept, those of earlier exports, the one being written."""
    exports = _export_steps(config)
    every = config.checkpoint.every_steps
    saves = {*range(every, config.steps, every), *exports}
    return min(len(saves), config.checkpoint.keep_last + len(exports))


def _num_exports(config: AdaptConfig) -> int:
    return len(_export_steps(config)) * len(set(config.export.dtypes))


def _export_steps(config: AdaptConfig) -> set[int]:
    return {step for step in config.export.steps if step < config.steps} | {config.steps}


def _is_there(config: AdaptConfig) -> int:
    """Bytes that an earlier attempt has written."""
    directory = RunDirectory(Path(str(config.run_directory)))
    folders = [directory.checkpoints, *directory.path.glob("export*")]
    files = (file for folder in folders if folder.is_dir() for file in folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())
