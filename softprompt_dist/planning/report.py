"""A plan in words, as a table and as the files that make it happen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from softprompt_dist.backbone.cell import Cell
from softprompt_dist.planning.choose import (
    Plan,
    Question,
    fewest_gpus,
    largest_micro_batch,
    scoring_of,
)
from softprompt_dist.planning.timing import ASSUMPTIONS
from softprompt_dist.planning.work import backward_operations, forward_operations

_WORDS = ("", "backbone", "precision", "off-load", "recompute")
_MEMORY = ("weights", "gathered", "active", "logits", "other", "GPU GB", "host GB")
_SPEED = ("recv GB", "copy GB", "step ms", "rows/s", "load s", "conv. s")


def describe_question(question: Question) -> list[str]:
    """What was asked."""
    architecture, workload = question.architecture, question.workload
    cluster = question.machine.cluster
    operations = forward_operations(architecture, workload)
    operations += backward_operations(architecture, workload)
    decoder = f" + {architecture.num_decoder_layers}" if architecture.num_decoder_layers else ""
    return [
        f"{architecture.name}: {architecture.num_parameters:,} weights, "
        f"{architecture.num_layers}{decoder} layers",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs with {question.device_bytes / 1e9:g} GB; "
        f"micro-batch {workload.micro_batch}, {workload.prompt_length} prompt + "
        f"{workload.input_length} input tokens, {workload.target_length} target tokens, dropout "
        f"{workload.dropout:g}; "
        f"{operations * cluster.num_gpus / 1e12:.1f} TFLOP a step",
    ]


def table(plans: Sequence[Plan], question: Question, chosen: Plan | None) -> list[str]:
    """One line a cell; `*` marks the chosen one, `-` what does not fit."""
    rows: list[tuple[str, ...]] = [(*_WORDS, *_MEMORY, *_SPEED)]
    rows += [_row(plan, question, is_chosen=plan is chosen) for plan in plans]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if index < len(_WORDS) else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _row(plan: Plan, question: Question, *, is_chosen: bool) -> tuple[str, ...]:
    cell, memory = plan.cell, plan.memory
    other = memory.buffers + memory.cached + memory.context
    parts = (memory.weights, memory.gathered, memory.activations, memory.logits, other)
    rows = question.workload.micro_batch * question.machine.cluster.num_gpus
    return (
        "*" if is_chosen else " " if plan.fits else "-",
        cell.sharding + (" in node" if cell.shard_group == "node" else ""),
        precision(cell),
        cell.offload,
        cell.activation_checkpointing,
        *(f"{number / 1e9:.2f}" for number in (*parts, memory.total)),
        f"{plan.host / 1e9:.0f}",
        *(f"{number / 1e9:.3f}" for number in (plan.received, plan.offloaded)),
        f"{plan.step.total * 1e3:.0f}",
        f"{rows / plan.step.total:.1f}",
        f"{plan.loading:.1f}",
        f"{plan.loading_converted:.1f}",
    )


def precision(cell: Cell) -> str:
    """Such as bf16, or int8/bf16 where bf16 is what is computed in."""
    if cell.quantization == "none":
        return cell.dtype
    return f"{cell.quantization}/{cell.dtype}"


def footnotes(question: Question) -> list[str]:
    """What the numbers mean, and what they assume."""
    machine, gpu = question.machine, question.machine.gpu
    bf16 = f"{gpu.bf16_tflops:g} TFLOP/s bf16" if gpu.bf16_tflops else "no bf16"
    return [
        "GB are 10^9 bytes. * chosen, - does not fit. A step is one micro-batch on every GPU. "
        "recv: received by a GPU in a step (gathers, prompt); copy: from host or disk. other: "
        "prompt, optimizer, norms, the GPU's context, communication, fragmentation, and freed "
        "blocks that are still computed with.",
        f"load: from the checkpoint ({question.architecture.checkpoint_bytes_per_weight} bytes a "
        "weight); conv.: from a copy written by `softprompt convert`.",
        f"Speeds: {bf16}, {gpu.fp32_tflops:g} fp32; in GB/s {gpu.memory_gb_per_second:g} GPU "
        f"memory, {gpu.link_gb_per_second:g} between GPUs, {gpu.host_gb_per_second:g} host to GPU, "
        f"{machine.network_gb_per_second:g} between nodes, {machine.disk_gb_per_second:g} disk.",
        *ASSUMPTIONS,
    ]


def advice(plan: Plan, question: Question, model: str, config_path: str | None) -> list[str]:
    """The chosen cell, and how to run it."""
    workload, cluster = question.workload, question.machine.cluster
    most = largest_micro_batch(question, plan.cell)
    spare = question.device_bytes - plan.memory.total
    scored, seconds = scoring_of(question, plan.cell)
    return [
        f"Chosen: {_name(plan.cell)}; {plan.memory.total / 1e9:.1f} GB of a GPU, "
        f"{spare / 1e9:.1f} to spare. Up to micro-batch {most} fits."
        + ("" if config_path else " `--write FILE` writes its ds_config."),
        f"Scoring: {scored:,} positions at a time (evaluation.batch_tokens, where it is left out); "
        f"1,000 of the longest rows are answered in about {1000 * seconds:.0f} s.",
        "",
        f"deepspeed --num_gpus {cluster.gpus_per_node} -m softprompt_dist.train --recipe RECIPE \\",
        f"    --deepspeed_config {shlex.quote(config_path or 'FILE')} \\",
        f"    --set {shlex.quote(f'backbone.path={model}')} "
        f"--set batch.micro_batch_size={workload.micro_batch} \\",
        f"    --set prompt.prompt_length={workload.prompt_length} "
        f"--set backbone.max_input_tokens={workload.input_length}",
    ]


def refusal(plans: Sequence[Plan], question: Question) -> str:
    """Why nothing fits, in numbers, and what would."""
    least = min(plans, key=lambda plan: plan.memory.total)
    message = (
        f"Nothing fits {question.device_bytes / 1e9:g} GB per GPU: the least is "
        f"{_name(least.cell)} with {least.memory.total / 1e9:.1f} GB"
    )
    host_memory = question.machine.host_memory_gb
    if least.memory.total <= question.device_bytes and host_memory is not None:
        message += f", which needs {least.host / 1e9:.0f} GB of host memory, not {host_memory:g}"
    most = max(largest_micro_batch(question, plan.cell) for plan in plans)
    gpus = None if most else fewest_gpus(question)
    return f"{message}. {way_out(most, gpus)}"


def way_out(micro_batch: int, gpus: int | None) -> str:
    """What to do where nothing fits.

    Args:
        micro_batch: the largest that would fit, or 0.
        gpus: the fewest that would do, or None.
    """
    if micro_batch:
        return f"Lower --micro-batch to {micro_batch}."
    if gpus:
        return f"Use --gpus {gpus}, or GPUs with more memory."
    return "Use a smaller model, or GPUs with more memory."


def _name(cell: Cell) -> str:
    words = [cell.sharding, precision(cell)]
    if cell.shard_group == "node":
        words[0] += " within each node"
    if cell.offload != "none":
        words.append(f"off-loaded to {cell.offload}")
    if cell.activation_checkpointing != "none":
        words.append("activations computed again")
    return ", ".join(words)


def ds_config(cell: Cell, nvme_path: str | None = None) -> dict[str, Any]:
    """The JSON for `--deepspeed_config`: how the backbone is held, and nothing of the recipe's."""
    own: dict[str, Any] = {}
    if cell.quantization != "none":
        own["quantization"] = cell.quantization
        own["quantized_layers"] = cell.quantized_layers
    if cell.shard_group != "world":
        own["shard_group"] = cell.shard_group
    if cell.activation_checkpointing != "none":
        own["activation_checkpointing"] = cell.activation_checkpointing
    zero: dict[str, Any] = {"stage": 3 if cell.sharding == "zero3" else 0}
    if cell.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if cell.offload == "nvme":
        zero["offload_param"] = {"device": "nvme", "nvme_path": nvme_path, "pin_memory": True}
    values: dict[str, Any] = {"bf16": {"enabled": cell.dtype == "bf16"}}
    if own:
        values["softprompt"] = own
    return {**values, "zero_optimization": zero}


def ds_config_text(cell: Cell, nvme_path: str | None = None) -> str:
    """`ds_config` as it is written to a file."""
    return json.dumps(ds_config(cell, nvme_path), indent=2) + "\n"
