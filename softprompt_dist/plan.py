"""`softprompt plan`: what a run needs of given GPUs, before anything is loaded or rented.

softprompt plan --model google/t5-xxl-lm-adapt --gpus 8 --gpu-memory 40 --micro-batch 4
softprompt plan --stage adapt --model google/t5-v1_1-xxl --gpus 8 --gpu-memory 80
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softprompt_dist.backbone.cell import Cluster, Workload
from softprompt_dist.durable import replace_file
from softprompt_dist.errors import ConfigError, MachineError
from softprompt_dist.parallel.verb import VerbParser, count, run_verb
from softprompt_dist.planning.adaptation import (
    DEFAULT_MFU,
    DEFAULT_STEPS,
    DEFAULT_TOKENS,
    PRESETS,
    AdaptationQuestion,
    adaptation_plans,
    check_micro_batch,
    choose_adaptation,
    row_lengths,
    rows_of,
    usual_micro_batch,
    with_micro_batch_that_fits,
)
from softprompt_dist.planning.adaptation_report import (
    adaptation_ds_config_text,
    adaptation_refusal,
    report_adaptation,
)
from softprompt_dist.planning.choose import DEFAULT_DROPOUT, Question, all_plans, choose
from softprompt_dist.planning.machine import DEFAULT_GPU, GPUS, Gpu, Machine, gpu_named
from softprompt_dist.planning.models import find_architecture
from softprompt_dist.planning.options import add_number, amount, rate, share
from softprompt_dist.planning.report import (
    advice,
    describe_question,
    ds_config_text,
    footnotes,
    refusal,
    table,
)

_TUNE, _ADAPT = "tune", "adapt"
_ONLY = {
    _TUNE: (
        "prompt_length", "quantized_layers", "nvme_path", "gpu_memory_gb_per_second",
        "link_gb_per_second", "host_gb_per_second", "network_gb_per_second", "disk_gb_per_second",
    ),
    _ADAPT: ("preset", "tokens_per_batch", "steps", "mfu", "optimizer"),
}  # fmt: skip
"""Stage -> the options that mean something for it alone; None where they are not given."""


def build_parser() -> VerbParser:
    """Options of `softprompt plan`."""
    parser = VerbParser("plan", "Memory and time of every way to run, and the one to take.")
    parser.add_argument(
        "--stage",
        choices=(_TUNE, _ADAPT),
        default=_TUNE,
        help="tune: a prompt before a frozen backbone (default); adapt: all weights, on plain text",
    )
    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        required=True,
        help="folder with config.json, or hub name; public T5 and Llama need no network",
    )
    parser.add_argument("--revision", metavar="REV", help="of a hub name")
    parser.add_argument("--write", metavar="JSON", help="write the chosen ds_config there")
    work = Workload()
    for name, purpose in (
        ("micro-batch", f"rows on a GPU at a time (tune: {work.micro_batch}; adapt: up to 16)"),
        ("input-length", f"tokens of the longest input, or a row (tune: {work.input_length})"),
        ("target-length", f"tokens of the longest target, or a row (tune: {work.target_length})"),
    ):
        add_number(parser, name, count, purpose)
    add_number(parser, "dropout", rate, f"of the recipe (tune: {DEFAULT_DROPOUT}; adapt: 0)")
    _add_machine_options(parser)
    _add_tune_options(parser)
    _add_adapt_options(parser)
    return parser


def _add_machine_options(parser: VerbParser) -> None:
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default=DEFAULT_GPU,
        help=f"memory and speeds of {', '.join(GPUS)} (default: {DEFAULT_GPU})",
    )
    add_number(parser, "gpus", count, "GPUs of each node (default: 1)", 1)
    add_number(parser, "nodes", count, "number of nodes (default: 1)", 1)
    for name, purpose in (
        ("gpu-memory", "GB (10^9 bytes) of a GPU, instead of --gpu's"),
        ("gpu-tflops", "peak of its dense bf16 products (fp32 where it has no bf16)"),
        ("host-memory", "GB of a node; not checked where left out"),
    ):
        add_number(parser, name, amount, purpose)


def _add_tune_options(parser: VerbParser) -> None:
    group = parser.add_argument_group("--stage tune")
    machine = Machine(gpu_named(DEFAULT_GPU), Cluster())
    purpose = f"trained vectors before the input (default: {Workload().prompt_length})"
    add_number(group, "prompt-length", count, purpose)
    group.add_argument(
        "--quantized-layers",
        choices=["blocks", "blocks_without_wo"],
        help="which matrices int8 and nf4 quantize, as in the recipe (default: blocks)",
    )
    group.add_argument(
        "--nvme-path", metavar="FOLDER", help="plan with off-loading to this disk, too"
    )
    network, disk = machine.network_gb_per_second, machine.disk_gb_per_second
    for name, purpose in (
        ("gpu-memory-gb-per-second", "speed of a GPU's memory"),
        ("link-gb-per-second", "what a GPU receives from the others of its node"),
        ("host-gb-per-second", "from the node's memory to a GPU"),
        ("network-gb-per-second", f"what a GPU receives from other nodes (default: {network:g})"),
        ("disk-gb-per-second", f"what a node reads (default: {disk:g})"),
    ):
        add_number(group, name, amount, purpose)


def _add_adapt_options(parser: VerbParser) -> None:
    group = parser.add_argument_group("--stage adapt")
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="recipe whose rows are planned (default: paper-512-512, without other lengths)",
    )
    purpose = f"positions of the longer side of all rows (default: 2^20 = {DEFAULT_TOKENS})"
    add_number(group, "tokens-per-batch", count, purpose)
    add_number(group, "steps", count, f"updates in all (default: {DEFAULT_STEPS})")
    purpose = f"share of the peak that is reached (default: {DEFAULT_MFU})"
    add_number(group, "mfu", share, purpose)
    group.add_argument(
        "--optimizer",
        choices=("adafactor", "adamw", "rms_scaled_adamw"),
        help="as in the recipe (default: adafactor)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`.

    Raises:
        BackboneError: an unknown model.
        ConfigError: an unknown GPU, an option of the other stage, or no place to write.
        MachineError: nothing fits.
    """
    options = build_parser().parse_args(argv)
    _refuse_options_of_the_other_stage(options)
    target = None if options.write is None else _writable(Path(options.write))
    text = (_plan_tuning if options.stage == _TUNE else _plan_adaptation)(options)
    if target is not None:
        replace_file(target, text.encode())
        print(f"\nWritten: {target}")


def _plan_tuning(options: argparse.Namespace) -> str:
    """Print what was asked and found; returns the chosen ds_config."""
    question = _question(options)
    plans = all_plans(question)
    chosen = choose(plans)
    lines = [*describe_question(question), "", *table(plans, question, chosen), ""]
    lines += [f"- {note}" for note in footnotes(question)]
    if chosen is not None:
        lines += ["", *advice(chosen, question, options.model, options.write)]
    print("\n".join(lines), flush=True)
    if chosen is None:
        raise MachineError(refusal(plans, question))
    return ds_config_text(chosen.cell, options.nvme_path)


def _plan_adaptation(options: argparse.Namespace) -> str:
    """Print what was asked and found; returns the chosen ds_config."""
    question, preset = _adaptation_question(options)
    plans = adaptation_plans(question)
    chosen = choose_adaptation(plans)
    lines = report_adaptation(question, plans, chosen, preset, options.write)
    print("\n".join(lines), flush=True)
    if chosen is None:
        raise MachineError(adaptation_refusal(plans, question))
    return adaptation_ds_config_text(chosen, question)


def _refuse_options_of_the_other_stage(options: argparse.Namespace) -> None:
    other = _ADAPT if options.stage == _TUNE else _TUNE
    for name in _ONLY[other]:
        value = getattr(options, name)
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} says nothing about --stage {options.stage}. "
                f"Leave it out, or plan with --stage {other}."
            )


def _writable(path: Path) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"Cannot write the ds_config to {path}: it must be a file in a folder that exists. "
            "Make the folder, or choose another --write."
        )
    return path


def _gpu(options: argparse.Namespace) -> Gpu:
    gpu = gpu_named(options.gpu)
    speeds = {
        "bf16_tflops" if gpu.bf16_tflops else "fp32_tflops": options.gpu_tflops,
        "memory_gb": options.gpu_memory,
        "memory_gb_per_second": options.gpu_memory_gb_per_second,
        "link_gb_per_second": options.link_gb_per_second,
        "host_gb_per_second": options.host_gb_per_second,
    }
    return replace(gpu, **_given(speeds))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _question(options: argparse.Namespace) -> Question:
    gpu = _gpu(options)
    lengths = ("micro_batch", "prompt_length", "input_length", "target_length")
    dropout = DEFAULT_DROPOUT if options.dropout is None else options.dropout
    speeds = ("network_gb_per_second", "disk_gb_per_second")
    return Question(
        architecture=find_architecture(options.model, options.revision),
        workload=Workload(
            dropout=dropout, **_given({name: getattr(options, name) for name in lengths})
        ),
        machine=Machine(
            gpu=gpu,
            cluster=Cluster(gpus_per_node=options.gpus, nodes=options.nodes),
            host_memory_gb=options.host_memory,
            **_given({name: getattr(options, name) for name in speeds}),
        ),
        device_bytes=gpu.memory_gb * 1e9,
        quantized_layers=options.quantized_layers or "blocks",
        has_nvme=options.nvme_path is not None,
    )


def _adaptation_question(options: argparse.Namespace) -> tuple[AdaptationQuestion, str | None]:
    """What is asked, and the recipe with these rows where there is one."""
    architecture = find_architecture(options.model, options.revision)
    input_length, target_length, preset = row_lengths(
        architecture, options.preset, options.input_length, options.target_length
    )
    tokens = options.tokens_per_batch or DEFAULT_TOKENS
    cluster = Cluster(gpus_per_node=options.gpus, nodes=options.nodes)
    rows = rows_of(tokens, input_length, target_length)
    micro_batch = options.micro_batch or usual_micro_batch(rows, cluster.num_gpus)
    check_micro_batch(rows, cluster.num_gpus, micro_batch)
    question = AdaptationQuestion(
        architecture=architecture,
        gpu=_gpu(options),
        cluster=cluster,
        input_length=input_length,
        target_length=target_length,
        micro_batch=micro_batch,
        tokens_per_batch=tokens,
        steps=options.steps or DEFAULT_STEPS,
        mfu=options.mfu or DEFAULT_MFU,
        optimizer=options.optimizer or "adafactor",
        host_memory_gb=options.host_memory,
        dropout=options.dropout or 0.0,
    )
    return (question if options.micro_batch else with_micro_batch_that_fits(question)), preset


if __name__ == "__main__":
    run_verb(main)
