"""A plan of LM adaptation in words, as a table and as the file that makes it happen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from softprompt_dist.planning.adaptation import (
    DEFAULT_STEPS,
    DEFAULT_TOKENS,
    AdaptationPlan,
    AdaptationQuestion,
    Budget,
    budget,
    fewest_adaptation_gpus,
    is_exact,
    largest_adaptation_micro_batch,
    real_share,
    rows_of_pairs,
)
from softprompt_dist.planning.adaptation_memory import (
    Engine,
    bucket_elements,
    checkpoint_bytes,
    export_bytes,
    matrix_shapes,
    num_statistics,
)
from softprompt_dist.planning.report import way_out

_HEADER = (
    *("", "ZeRO", "sums", "recompute", "off-load", "weights", "grads", "sums", "masters"),
    *("optim.", "states", "copies", "buckets", "active", "logits", "update", "reserve"),
    *("GPU GB", "host GB"),
)
_NUM_WORDS = 5
_FP32_NOTE = (
    "fp32 weights (masters) always: an update is about a thousandth of a weight, less than bf16 "
    "resolves, and training on bf16 weights would stall."
)


def report_adaptation(
    question: AdaptationQuestion,
    plans: Sequence[AdaptationPlan],
    chosen: AdaptationPlan | None,
    preset: str | None,
    config_path: str | None,
) -> list[str]:
    """What was asked and found, and how to run it, in lines.

    Args:
        question: what was asked.
        plans: all ways.
        chosen: the one to take; None if nothing fits.
        preset: recipe with the rows asked about, if there is one.
        config_path: where the ds_config is written, if it is.
    """
    lines = [*_describe(question), "", *_table(plans, chosen), ""]
    lines += [f"- {note}" for note in (*_notes(question), _saving_note(plans))]
    lines += ["", *_costs(question)]
    if chosen is not None:
        lines += ["", *_advice(chosen, question, preset, config_path)]
    return lines


def _describe(question: AdaptationQuestion) -> list[str]:
    """What was asked."""
    architecture, cluster = question.architecture, question.cluster
    decoder = f" + {architecture.num_decoder_layers}" if architecture.num_decoder_layers else ""
    lengths = f"{question.input_length} + {question.target_length}"
    return [
        f"{architecture.name}: {architecture.num_parameters:,} weights, "
        f"{architecture.num_layers}{decoder} layers; {_optimizer(question)}",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs with {question.gpu.memory_gb:g} GB; a "
        f"step is {question.rows:,} rows of {lengths} positions = {cluster.num_gpus} GPUs x "
        f"{question.num_micro_batches} micro-batches x {question.micro_batch} rows",
    ]


def _optimizer(question: AdaptationQuestion) -> str:
    if question.optimizer != "adafactor":
        return f"{question.optimizer}: two fp32 numbers a weight"
    architecture = question.architecture
    count, small = num_statistics(architecture), architecture.small_size
    num_matrices = sum(1 for _ in matrix_shapes(architecture))
    return (
        f"adafactor: {(count - small) / 1e6:.2f} M numbers for {num_matrices} matrices, "
        f"{small / 1e6:.2f} M for the rest"
    )


def _table(plans: Sequence[AdaptationPlan], chosen: AdaptationPlan | None) -> list[str]:
    """One line a way; `*` marks the chosen one, `-` what does not fit."""
    rows: list[tuple[str, ...]] = [_HEADER]
    rows += [_row(plan, is_chosen=plan is chosen) for plan in plans]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if index < _NUM_WORDS else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _row(plan: AdaptationPlan, *, is_chosen: bool) -> tuple[str, ...]:
    engine, memory = plan.engine, plan.memory
    numbers = (
        *(memory.weights, memory.gradients, memory.sums, memory.masters, memory.optimizer),
        *(memory.states, memory.copies, memory.buckets, memory.activations, memory.logits),
        *(memory.update, memory.reserve, memory.total),
    )
    return (
        "*" if is_chosen else " " if plan.fits else "-",
        str(engine.stage),
        engine.sums,
        "layers" if engine.checkpointing else "none",
        "cpu" if engine.offload else "none",
        *(f"{number / 1e9:.2f}" for number in numbers),
        f"{plan.host / 1e9:.0f}",
    )


def _notes(question: AdaptationQuestion) -> list[str]:
    """What the numbers mean, and the traps."""
    notes = [
        "GB are 10^9 bytes. * chosen, - does not fit. states: what stays from step to step. "
        "copies: weights cast to bf16 (stage 0) or gathered (stage 3). update: the transient fp32 "
        "gradient of a step, where it needs more than the room of activations and logits.",
    ]
    if question.gpu.bf16_tflops is None:
        return [*notes, "This GPU has no bf16: all in fp32. fp16 is refused: T5 overflows in it."]
    return [
        *notes,
        _FP32_NOTE,
        "Stage 1 with fp32 sums keeps them whole on every GPU, 4 bytes a weight, however many GPUs "
        "there are; stages 2 and 3 cut them.",
        f"DeepSpeed's default adds the gradients of a step's micro-batches (here "
        f"{question.num_micro_batches}) up in bf16, where small ones get lost: the ds_config sets "
        "data_types.grad_accum_dtype to fp32. Stage 1 with bf16 sums is shown and never chosen.",
        "Off-loading comes last: with an optimizer that is not its own DeepSpeed raises, unless "
        "zero_force_ds_cpu_optimizer is false, and gradients cross to the node's memory after "
        "each micro-batch.",
    ]


def _saving_note(plans: Sequence[AdaptationPlan]) -> str:
    """What of a node's memory checkpoints take."""
    most = max(plan.saving for plan in plans) / 1e9
    return (
        f"host GB: of a node, for off-loading, and up to {most:.0f} GB from which checkpoints are "
        "written while training goes on; not where they do not fit (checkpoint.background=false)."
    )


def _costs(question: AdaptationQuestion) -> list[str]:
    """Operations, time, and bytes on the disk."""
    cost = budget(question)
    exports = export_bytes(question.architecture)
    lines = [
        f"Computing: {cost.row_operations / 1e12:.1f} TFLOP a row; {_cost(cost, question)}.",
        f"  Assumed: {100 * question.mfu:g} % of {question.peak_tflops:g} TFLOP/s (--mfu, --gpu, "
        "--gpu-tflops), recomputing not counted. Public T5 code on A100 reached 31 % (nanoT5, "
        "base), 14 to 29 % (T5X, small to large), 25 % (T5X, XL), 18 % (T5X, XXL on 512).",
    ]
    if question.input_length:
        lines.append(f"  {_filling(question)}")
    kept = checkpoint_bytes(question.architecture, question.optimizer)
    return [
        *lines,
        f"Disk: {kept / 1e9:.1f} GB a checkpoint (fp32 weights and optimizer), three are kept by "
        f"default: {3 * kept / 1e9:.0f} GB; an export {exports['fp32'] / 1e9:.1f} GB in fp32, "
        f"{exports['bf16'] / 1e9:.1f} GB in bf16.",
    ]


def _filling(question: AdaptationQuestion) -> str:
    """How much of the rows is text, and what full rows would save."""
    share = real_share(question.input_length, question.target_length)
    text = f"Rows of prefix_lm hold {100 * share:.0f} % real tokens where documents are long. "
    if question.input_length != question.target_length:
        return text + "packing: complementary_pairs fills rows whose two sides are equally long."
    rows = rows_of_pairs(question)
    return (
        f"{text}With packing: complementary_pairs {rows:,} full rows a step carry as many: "
        f"{_cost(budget(question, rows), question)}."
    )


def _cost(cost: Budget, question: AdaptationQuestion) -> str:
    operations = cost.operations / 1e18
    return (
        f"{operations:,.{0 if operations >= 10 else 2}f} EFLOP in {question.steps:,} steps, "
        f"{cost.gpu_hours:,.0f} GPU-hours, {cost.days:,.1f} days"
    )


def _advice(
    plan: AdaptationPlan, question: AdaptationQuestion, preset: str | None, config_path: str | None
) -> list[str]:
    """The chosen way, and how to run it."""
    spare = question.device_bytes - plan.memory.total
    most = largest_adaptation_micro_batch(question, plan.engine)
    text = (
        f"Chosen: {_name(plan.engine)}; {plan.memory.total / 1e9:.1f} GB of a GPU, "
        f"{spare / 1e9:.1f} to spare; {question.num_micro_batches} micro-batches of "
        f"{question.micro_batch} rows are accumulated. Up to micro-batch {most} fits."
    )
    if plan.engine.checkpointing:
        plain = replace(plan.engine, checkpointing=False)
        less = largest_adaptation_micro_batch(question, plain)
        text += (
            f" Without recomputing, which is a quarter of the computing, up to {less}."
            if less
            else ""
        )
    if config_path is None:
        text += " `--write FILE` writes its ds_config."
    return [text, "", *_command(plan, question, preset, config_path)]


def _command(
    plan: AdaptationPlan, question: AdaptationQuestion, preset: str | None, config_path: str | None
) -> list[str]:
    cluster = question.cluster
    nodes = f"--num_nodes {cluster.nodes} " if cluster.nodes > 1 else ""
    settings = [f"backbone={question.architecture.name}", "corpus=[FOLDER]"]
    if preset is None:
        settings += [f"targets_length={question.target_length}"]
        settings += [f"inputs_length={question.input_length}"] if question.input_length else []
    if preset is None or question.tokens_per_batch != DEFAULT_TOKENS:
        settings.append(f"batch.global_batch_size={question.rows}")
    settings.append(f"batch.micro_batch_size={question.micro_batch}")
    if question.optimizer != "adafactor":
        settings.append(f"optimizer={question.optimizer}")
    if plan.engine.checkpointing:
        settings.append("engine.activation_checkpointing=true")
    if not plan.saving:
        settings.append("checkpoint.background=false")
    lines = [
        f"deepspeed {nodes}--num_gpus {cluster.gpus_per_node} -m softprompt_dist.adapt "
        f"--recipe {preset or 'RECIPE'}",
        f"    --deepspeed_config {shlex.quote(config_path or 'FILE')}"
        + ("" if question.steps == DEFAULT_STEPS else f" --steps {question.steps}"),
    ]
    lines += [f"    --set {shlex.quote(setting)}" for setting in settings]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def adaptation_refusal(plans: Sequence[AdaptationPlan], question: AdaptationQuestion) -> str:
    """Why nothing fits, in numbers, and what would."""
    exact = [plan for plan in plans if is_exact(plan.engine)]
    least = min(exact, key=lambda plan: plan.memory.total)
    message = (
        f"Nothing fits {question.gpu.memory_gb:g} GB per GPU: the least is {_name(least.engine)} "
        f"with {least.memory.total / 1e9:.1f} GB"
    )
    room = question.host_memory_gb
    if least.memory.total <= question.device_bytes and room is not None:
        message += f", which needs {least.host / 1e9:.0f} GB of host memory, not {room:g}"
    most = max(largest_adaptation_micro_batch(question, plan.engine) for plan in exact)
    gpus = None if most else fewest_adaptation_gpus(question)
    return f"{message}. {way_out(most, gpus)}"


def _name(engine: Engine) -> str:
    words = [f"ZeRO-{engine.stage}" if engine.stage else "no ZeRO", engine.dtype]
    if engine.checkpointing:
        words.append("activation checkpointing")
    if engine.offload:
        words.append("optimizer off-loaded to the node's memory")
    return ", ".join(words)


def adaptation_ds_config(plan: AdaptationPlan, question: AdaptationQuestion) -> dict[str, Any]:
    """The JSON for `--deepspeed_config`: engine plumbing, and nothing of the recipe's."""
    engine = plan.engine
    zero: dict[str, Any] = {"stage": engine.stage}
    if engine.stage:
        zero["overlap_comm"] = True
        zero["contiguous_gradients"] = True
        zero["reduce_bucket_size"] = bucket_elements(question.architecture)
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    values: dict[str, Any] = {"bf16": {"enabled": engine.dtype == "bf16"}}
    if engine.stage and engine.dtype == "bf16":
        values["data_types"] = {"grad_accum_dtype": engine.sums}
    return {**values, "zero_optimization": zero}


def adaptation_ds_config_text(plan: AdaptationPlan, question: AdaptationQuestion) -> str:
    """`adaptation_ds_config` as it is written to a file."""
    return json.dumps(adaptation_ds_config(plan, question), indent=2) + "\n"
