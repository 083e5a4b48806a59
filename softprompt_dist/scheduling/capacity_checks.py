"""Whether what a pipeline asks of Slurm fits what its stages compute: ranks, memory, time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.backbone.memory_model import predict_memory
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job import Job, check_world_size
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import BackboneError
from softprompt_dist.planning.adaptation import DEFAULT_MFU, AdaptationQuestion, budget
from softprompt_dist.planning.adaptation_memory import predict_adaptation_memory
from softprompt_dist.planning.machine import GPUS, Gpu
from softprompt_dist.planning.models import find_architecture
from softprompt_dist.scheduling.batch_job import BatchJob
from softprompt_dist.scheduling.batch_script import signal_lead_seconds, time_limit_seconds


def check_adaptation(batch_job: BatchJob, job: Job, gpu_name: str | None) -> list[Finding]:
    """An adaptation as one batch job."""
    cluster, findings = check_ranks(batch_job)
    if cluster is None:
        return findings
    findings += _named("adapt", check_world_size(job, cluster.num_gpus))
    architecture = architecture_at_hand(job.stages[0].backbone)
    gpu = _gpu("adapt room and time", gpu_name, architecture)
    if architecture is None or isinstance(gpu, Finding):
        return [*findings, gpu] if isinstance(gpu, Finding) else findings
    needed = max(_adaptation_room(each, job, architecture, cluster) for each in job.stages)
    limit = batch_job.all_options.get("time")
    time = _adaptation_time(job.stages, architecture, cluster, gpu, limit)
    return [*findings, _room("adapt room", needed, gpu), time]


def check_tuning(
    batch_job: BatchJob, job: Job, gpu_name: str | None, adapted: str | None
) -> list[Finding]:
    """An element of a sweep.

    Args:
        batch_job: the sweep.
        job: its first element.
        gpu_name: what it runs on, if the recipe says so.
        adapted: the model that an adaptation before it starts from, if there is one.
    """
    config = job.config
    assert config is not None
    cluster, findings = check_ranks(batch_job)
    if cluster is None:
        return findings
    findings += _named("tune", check_world_size(job, cluster.num_gpus))
    architecture = architecture_at_hand(adapted or config.backbone.path)
    gpu = _gpu("tune room", gpu_name, architecture)
    if architecture is None or isinstance(gpu, Finding):
        return [*findings, gpu] if isinstance(gpu, Finding) else findings
    return [*findings, _room("tune room", _tuning_room(config, architecture, cluster), gpu)]


def check_ranks(job: BatchJob) -> tuple[Cluster | None, list[Finding]]:
    """The nodes and ranks that are asked for, one rank a GPU."""
    name, tasks, gpus = f"{job.stage} ranks", job.tasks, job.gpus_per_node
    if tasks is None:
        wanted = {key: job.all_options.get(key) for key in ("nodes", "ntasks-per-node", "ntasks")}
        told = ", ".join(f"{key} {value}" for key, value in wanted.items() if value)
        return None, [Finding(name, "ok", f"not checked: {told} is no fixed number of ranks")]
    nodes, per_node = tasks
    found = f"{nodes} node(s) x {per_node} rank(s)" + (f" on {gpus} GPU(s)" if gpus else "")
    if gpus and gpus != per_node:
        remedy = (
            f"One rank runs on each GPU: set ntasks-per-node: {gpus} or gpus-per-node: {per_node} "
            f"in {job.stage}.sbatch."
        )
        return None, [Finding(name, "fail", found, remedy)]
    return Cluster(per_node, nodes), [Finding(name, "ok", found)]


def check_warning(job: BatchJob) -> list[Finding]:
    """A job that is warned of its end as soon as it begins would save and requeue for ever."""
    limit, warning = job.all_options.get("time"), job.all_options.get("signal")
    seconds, lead = time_limit_seconds(limit), signal_lead_seconds(warning)
    if not seconds or not lead or lead < seconds:
        return []
    remedy = (
        "Each attempt would be told at once to save and end. Raise `time`, or set `signal` to "
        f"B:USR1@N with an N well below it, in {job.stage}.sbatch."
    )
    found = f"signal {warning} comes {lead} s before the end of a limit of {limit}"
    return [Finding(f"{job.stage} time", "fail", found, remedy)]


def architecture_at_hand(model: str | None) -> Architecture | None:
    """A model's numbers without asking the network; None where they are not here, or not known."""
    if model is None:
        return None
    try:
        is_here = Path(model).is_dir() or model == "demo:tiny-t5"
        return find_architecture(model) if is_here else known_architecture(model)
    except (BackboneError, OSError):
        return None


def _gpu(name: str, gpu: str | None, architecture: Architecture | None) -> Gpu | Finding:
    """The GPU that predictions are for, or why there are none."""
    if gpu is None:
        return Finding(name, "ok", "not checked: `gpu` says no name, such as a100-80")
    if gpu.lower() not in GPUS:
        remedy = f"Name the nearest of {', '.join(GPUS)} as `gpu`, or leave it out."
        return Finding(name, "fail", f"there are no numbers for {gpu}", remedy)
    if architecture is None:
        return Finding(name, "ok", "not checked: no config.json of a known kind is at hand")
    return GPUS[gpu.lower()]


def _adaptation_room(
    config: AdaptConfig, job: Job, architecture: Architecture, cluster: Cluster
) -> float:
    from softprompt_dist.checks.adaptation_room import engine_of, row_lengths

    engine, (inputs, targets) = engine_of(config, job.ds_config), row_lengths(config)
    work = Workload(config.batch.micro_batch_size, 0, inputs, targets, config.dropout)
    return predict_adaptation_memory(architecture, engine, work, cluster, config.optimizer).total


def _tuning_room(config: TuneConfig, architecture: Architecture, cluster: Cluster) -> float:
    work = Workload(
        micro_batch=config.batch.micro_batch_size,
        prompt_length=config.prompt.prompt_length,
        input_length=config.backbone.max_input_tokens,
        dropout=config.backbone.dropout,
    )
    return predict_memory(architecture, Cell.of(config.backbone), work, cluster).total


def _room(name: str, needed: float, gpu: Gpu) -> Finding:
    found = f"{needed / 1e9:.1f} GB of a GPU predicted, {gpu.memory_gb:g} GB there"
    if needed <= gpu.memory_gb * 1e9:
        return Finding(name, "ok", found)
    stage = " --stage adapt" if name.startswith("adapt") else ""
    remedy = (
        "Ask for more GPUs with ZeRO, lower batch.micro_batch_size, or hold weights in fewer "
        f"bytes; `softprompt plan{stage}` shows what fits and writes a ds_config for it."
    )
    return Finding(name, "fail", found, remedy)


def _adaptation_time(
    stages: Sequence[AdaptConfig],
    architecture: Architecture,
    cluster: Cluster,
    gpu: Gpu,
    limit: str | None,
) -> Finding:
    """GPU-hours against the time limit: each further attempt is one requeue."""
    hours = sum(_gpu_hours(stage, architecture, cluster, gpu) for stage in stages)
    days = hours / cluster.num_gpus / 24
    found = (
        f"{hours:,.0f} GPU-hours predicted at {DEFAULT_MFU:.0%} of the peak, {days:,.1f} days on "
        f"{cluster.num_gpus} GPU(s)"
    )
    seconds = time_limit_seconds(limit)
    if not seconds:
        return Finding("adapt time", "ok", f"{found}; no time limit to compare it with")
    attempts = math.ceil(days * 86400 / seconds)
    if attempts <= 1:
        return Finding("adapt time", "ok", f"{found}, within the limit of {limit}")
    remedy = (
        f"A limit of {limit} takes about {attempts - 1} requeue(s), which the batch script asks "
        "for by itself; each goes on from the newest checkpoint. More nodes, or a longer time, "
        "take fewer."
    )
    return Finding("adapt time", "warn", found, remedy)


def _gpu_hours(
    config: AdaptConfig, architecture: Architecture, cluster: Cluster, gpu: Gpu
) -> float:
    from softprompt_dist.checks.adaptation_room import row_lengths

    inputs, targets = row_lengths(config)
    question = AdaptationQuestion(
        architecture=architecture,
        gpu=gpu,
        cluster=cluster,
        input_length=inputs,
        target_length=targets,
        micro_batch=config.batch.micro_batch_size,
        steps=config.steps,
        optimizer=config.optimizer,
    )
    return budget(question, rows=config.batch.global_batch_size).gpu_hours


def _named(stage: str, findings: Sequence[Finding]) -> list[Finding]:
    return [dataclasses.replace(each, name=f"{stage} {each.name}") for each in findings]
