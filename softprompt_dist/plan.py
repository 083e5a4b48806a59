"""`softprompt plan`: how to hold a backbone on given GPUs, before anything is loaded or rented.

softprompt plan --model google/t5-xxl-lm-adapt --gpus 8 --gpu-memory 40 --micro-batch 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from softprompt_dist.backbone.cell import Cluster, Workload
from softprompt_dist.durable import replace_file
from softprompt_dist.errors import ConfigError, MachineError
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.planning.choose import Question, all_plans, choose
from softprompt_dist.planning.machine import DEFAULT_GPU, GPUS, Machine, gpu_named
from softprompt_dist.planning.models import find_architecture
from softprompt_dist.planning.report import (
    advice,
    describe_question,
    ds_config_text,
    footnotes,
    refusal,
    table,
)


def build_parser() -> VerbParser:
    """Options of `softprompt plan`."""
    parser = VerbParser("plan", "Memory, traffic and time of every way to hold a backbone.")
    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        required=True,
        help="folder with config.json, or hub name; public T5 and Llama need no network",
    )
    parser.add_argument("--revision", metavar="REV", help="of a hub name")
    parser.add_argument("--write", metavar="JSON", help="write the chosen ds_config there")
    _add_workload_options(parser)
    _add_machine_options(parser)
    return parser


def _add_workload_options(parser: VerbParser) -> None:
    defaults = Workload()
    for name, default, purpose in (
        ("micro-batch", defaults.micro_batch, "rows on a GPU at a time"),
        ("prompt-length", defaults.prompt_length, "trained vectors before the input"),
        ("input-length", defaults.input_length, "tokens of the longest input"),
        ("target-length", defaults.target_length, "tokens of the longest target"),
    ):
        _add_number(parser, name, _whole, f"{purpose} (default: {default})", default)
    parser.add_argument(
        "--quantized-layers",
        choices=["blocks", "blocks_without_wo"],
        default="blocks",
        help="which matrices int8 and nf4 quantize, as in the recipe (default: blocks)",
    )


def _add_machine_options(parser: VerbParser) -> None:
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default=DEFAULT_GPU,
        help=f"memory and speeds of {', '.join(GPUS)} (default: {DEFAULT_GPU})",
    )
    machine = Machine(gpu_named(DEFAULT_GPU), Cluster())
    _add_number(parser, "gpus", _whole, "GPUs of each node (default: 1)", 1)
    _add_number(parser, "nodes", _whole, "number of nodes (default: 1)", 1)
    for name, purpose in (
        ("gpu-memory", "GB (10^9 bytes) of a GPU, instead of --gpu's"),
        ("gpu-tflops", "peak of its dense bf16 products (fp32 where it has no bf16)"),
        ("gpu-memory-gb-per-second", "speed of its memory"),
        ("link-gb-per-second", "what a GPU receives from the others of its node"),
        ("host-gb-per-second", "from the node's memory to a GPU"),
        ("host-memory", "GB of a node; not checked where left out"),
    ):
        _add_number(parser, name, _amount, purpose, None)
    network, disk = machine.network_gb_per_second, machine.disk_gb_per_second
    purpose = f"what a GPU receives from other nodes (default: {network:g})"
    _add_number(parser, "network-gb-per-second", _amount, purpose, network)
    purpose = f"what a node reads (default: {disk:g})"
    _add_number(parser, "disk-gb-per-second", _amount, purpose, disk)
    parser.add_argument(
        "--nvme-path", metavar="FOLDER", help="plan with off-loading to this disk, too"
    )


def _add_number(
    parser: VerbParser, name: str, kind: Callable[[str], float], purpose: str, default: float | None
) -> None:
    parser.add_argument(f"--{name}", metavar="N", type=kind, default=default, help=purpose)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`.

    Raises:
        BackboneError: an unknown model.
        ConfigError: an unknown GPU, or no place to write.
        MachineError: nothing fits.
    """
    options = build_parser().parse_args(argv)
    target = None if options.write is None else _writable(Path(options.write))
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
    if target is not None:
        replace_file(target, ds_config_text(chosen.cell, options.nvme_path).encode())
        print(f"\nWritten: {target}")


def _writable(path: Path) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"Cannot write the ds_config to {path}: it must be a file in a folder that exists. "
            "Make the folder, or choose another --write."
        )
    return path


def _question(options: argparse.Namespace) -> Question:
    gpu = gpu_named(options.gpu)
    speeds = {
        "bf16_tflops" if gpu.bf16_tflops else "fp32_tflops": options.gpu_tflops,
        "memory_gb": options.gpu_memory,
        "memory_gb_per_second": options.gpu_memory_gb_per_second,
        "link_gb_per_second": options.link_gb_per_second,
        "host_gb_per_second": options.host_gb_per_second,
    }
    gpu = replace(gpu, **{name: value for name, value in speeds.items() if value is not None})
    return Question(
        architecture=find_architecture(options.model, options.revision),
        workload=Workload(
            micro_batch=options.micro_batch,
            prompt_length=options.prompt_length,
            input_length=options.input_length,
            target_length=options.target_length,
        ),
        machine=Machine(
            gpu=gpu,
            cluster=Cluster(gpus_per_node=options.gpus, nodes=options.nodes),
            network_gb_per_second=options.network_gb_per_second,
            disk_gb_per_second=options.disk_gb_per_second,
            host_memory_gb=options.host_memory,
        ),
        device_bytes=gpu.memory_gb * 1e9,
        quantized_layers=options.quantized_layers,
        has_nvme=options.nvme_path is not None,
    )


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


if __name__ == "__main__":
    run_verb(main)
