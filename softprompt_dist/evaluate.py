"""`softprompt evaluate`: score a prompt file on a split of a task, on one rank or many.

softprompt evaluate --prompt runs/demo/prompt/best.safetensors --task boolq --split validation
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt_dist import screen
from softprompt_dist.parallel import stop
from softprompt_dist.parallel.verb import VerbParser, count, run_verb
from softprompt_dist.run.options import prompt_config


def build_parser() -> VerbParser:
    """Options of `softprompt evaluate`."""
    parser = VerbParser(
        "evaluate", "Score a prompt file. Without --recipe: the config of the run that made it."
    )
    parser.add_recipe_options()
    parser.add_prompt_options()
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument(
        "--max-examples", type=count, metavar="N", help="score a fair sample of N rows"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="write report.md, results.json, predictions.jsonl and confusion.png",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    screen.outlive_readers()
    stop.listen()
    options = build_parser().parse_args(argv)
    config, ds_config = prompt_config(options, split=options.split)

    from softprompt_dist.parallel.join import join_world, leave_world

    join_world(debug=options.debug, limit_seconds=config.health.longest_timeout_seconds)
    from softprompt_dist.lifecycle.attempt import told_to_batch_script
    from softprompt_dist.run.evaluation import ScoringRequest, evaluate

    output = Path(options.output) if options.output else None
    request = ScoringRequest(
        Path(options.prompt), options.split, options.max_examples, output, options.force
    )
    with told_to_batch_script(config.health, output):
        evaluate(config, request, ds_config)
    leave_world()


if __name__ == "__main__":
    run_verb(main)
