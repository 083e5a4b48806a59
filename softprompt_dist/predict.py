"""`softprompt predict`: have a prompt answer the rows of a file, on one rank or many.

softprompt predict --prompt runs/demo/prompt/best.safetensors --input in.jsonl --output out.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt_dist import screen
from softprompt_dist.parallel import stop
from softprompt_dist.parallel.verb import VerbParser, count, run_verb
from softprompt_dist.run.options import prompt_config


def build_parser() -> VerbParser:
    """Options of `softprompt predict`."""
    parser = VerbParser(
        "predict",
        "Answer the rows of a file, which need no labels. A run that was killed goes on where it "
        "stopped: start the same command again. Without --recipe: the config of the run that made "
        "the prompt.",
        epilog="Greedy answers end after evaluation.max_target_tokens; if that is not set, after "
        "as many as the longest label has, or 64 where answers are free text.",
    )
    parser.add_recipe_options()
    parser.add_prompt_options(rows_of_task=False)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="the rows, any number of them: .jsonl, .csv or .parquet, the first two also .gz",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the answers in the order of the rows: .jsonl",
    )
    parser.add_argument(
        "--window",
        type=count,
        metavar="N",
        help="rows that are read, answered and written at a time, in whole 512s (default: 4096); "
        "changes no answer",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="replace what is in --output; do not continue it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    screen.outlive_readers()
    stop.listen()
    options = build_parser().parse_args(argv)
    config, ds_config = prompt_config(options)

    from softprompt_dist.parallel.join import join_world, leave_world

    join_world(debug=options.debug, limit_seconds=config.health.longest_timeout_seconds)
    from softprompt_dist.lifecycle.attempt import told_to_batch_script
    from softprompt_dist.run.prediction import predict
    from softprompt_dist.run.prediction_desk import DEFAULT_WINDOW, PredictionRequest

    request = PredictionRequest(
        Path(options.prompt),
        Path(options.input),
        Path(options.output),
        window=options.window or DEFAULT_WINDOW,
        fresh=options.fresh,
        force=options.force,
    )
    with told_to_batch_script(config.health):
        predict(config, request, ds_config)
    leave_world()


if __name__ == "__main__":
    run_verb(main)
