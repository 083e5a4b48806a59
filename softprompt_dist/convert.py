"""`softprompt convert`: a bf16 or int8 copy of a backbone, so that later starts read less.

softprompt convert --backbone google/t5-xxl-lm-adapt --output /models/xxl-int8 --precision int8
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from softprompt_dist import screen
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.verb import VerbParser, run_verb

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def build_parser() -> VerbParser:
    """Options of `softprompt convert`."""
    parser = VerbParser(
        "convert", "Write a copy of a backbone in safetensors, in bf16 or int8, and check it."
    )
    parser.add_argument(
        "--backbone", metavar="PATH|NAME", required=True, help="as backbone.path in a recipe"
    )
    parser.add_argument("--revision", metavar="REV", help="hub revision (default: the newest)")
    parser.add_argument(
        "--output", metavar="FOLDER", required=True, type=Path, help="new folder for the copy"
    )
    parser.add_argument(
        "--precision",
        choices=["bf16", "int8"],
        required=True,
        help="int8: matrices of the layers, one scale per row; the rest as --rest says",
    )
    parser.add_argument(
        "--rest", choices=["bf16", "fp32"], help="int8: of all other tensors (default: bf16)"
    )
    parser.add_argument(
        "--quantized-layers",
        choices=["blocks", "blocks_without_wo"],
        help="int8: as backbone.quantized_layers in the recipes to come (default: blocks)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_size,
        default="5GB",
        help="of a file, such as 500MB or 5GB, 1 GB = 10^9 bytes (default: 5GB)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    screen.outlive_readers()
    options = build_parser().parse_args(argv)
    if options.precision != "int8" and (options.rest or options.quantized_layers):
        raise ConfigError(
            f"--precision is {options.precision}, and --rest and --quantized-layers are for int8. "
            "Leave them out, or set --precision int8."
        )
    _convert(options)


def _convert(options: argparse.Namespace) -> None:
    from softprompt_dist.backbone.conversion import (
        CopyFormat,
        check_output,
        weights_of_copy,
        write_copy,
    )
    from softprompt_dist.backbone.load import inventory_of, locate_backbone
    from softprompt_dist.backbone.weight_files import checkpoint_files
    from softprompt_dist.config import BackboneConfig
    from softprompt_dist.parallel import ranks

    if ranks.world_size() > 1:
        raise ConfigError(
            f"softprompt convert was started on {ranks.world_size()} ranks, and one writes the "
            "copy. Start it without a launcher."
        )
    check_output(options.output)
    config = BackboneConfig(path=options.backbone, revision=options.revision)
    source = locate_backbone(config)
    inventory = inventory_of(source, config)
    layers = (options.quantized_layers or "blocks") if options.precision == "int8" else None
    weights = weights_of_copy(inventory, CopyFormat(layers, options.rest or "bf16"))
    num_bytes = sum(weight.num_bytes for weight in weights)
    source_bytes = sum(file.stat().st_size for file in checkpoint_files(source))
    print(f"{source}: {source_bytes / 1e9:.2f} GB, as {options.precision} {num_bytes / 1e9:.2f} GB")
    write_copy(inventory, weights, options.output, max_shard_bytes=options.max_shard_size)
    print(
        f"Written, read back and found equal: {len(weights)} tensors. Use it with\n"
        f"  --set {shlex.quote(f'backbone.path={options.output}')} "
        f"{_matching_settings(options)}".rstrip()
    )


def _matching_settings(options: argparse.Namespace) -> str:
    settings = [] if options.rest == "fp32" else ["backbone.dtype=bf16"]
    if options.precision == "int8":
        settings.append("backbone.quantization=int8")
    if options.quantized_layers:
        settings.append(f"backbone.quantized_layers={options.quantized_layers}")
    return " ".join(f"--set {setting}" for setting in settings)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?", text, flags=re.IGNORECASE)
    value = float(found[1]) * _UNITS.get((found[2] or "").upper(), 1) if found else 0.0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or bytes")
    return int(value)


if __name__ == "__main__":
    run_verb(main)
