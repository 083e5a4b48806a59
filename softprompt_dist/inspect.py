"""`softprompt inspect`: what a prompt file is, and which vocabulary pieces its rows are nearest to.

softprompt inspect runs/demo/prompt/best.safetensors --backbone demo:smollm2-135m
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.parallel.verb import VerbParser, run_verb


def build_parser() -> VerbParser:
    """Options of `softprompt inspect`."""
    parser = VerbParser("inspect", "Show what a prompt file is and what its rows mean.")
    parser.add_argument("prompt", metavar="PROMPT", help="prompt file (.safetensors)")
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="show the vocabulary pieces nearest to each row, too, from this backbone",
    )
    parser.add_argument(
        "--neighbours", metavar="K", type=_positive, default=5, help="pieces per row (default: 5)"
    )
    parser.add_argument("--rows", metavar="N", type=_positive, help="only the first N rows")
    parser.add_argument(
        "--force", action="store_true", help="accept a prompt that was tuned for another backbone"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)

    from softprompt_dist.run.inspection import describe_neighbours, describe_prompt

    path = Path(options.prompt)
    lines = describe_prompt(path)
    if options.backbone:
        lines += ["", "row   nearest pieces (cosine)"]
        lines += describe_neighbours(
            path,
            options.backbone,
            num_neighbours=options.neighbours,
            num_rows=options.rows,
            force=options.force,
        )
    print("\n".join(lines))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


if __name__ == "__main__":
    run_verb(main)
