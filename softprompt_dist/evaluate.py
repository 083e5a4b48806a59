"""`softprompt evaluate`: score a prompt file on a split of its task, on one rank or many.

softprompt evaluate --prompt runs/demo/prompt/best.safetensors --split validation
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.errors import ConfigError, PromptFileError
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.run.options import tune_config


def build_parser() -> VerbParser:
    """Options of `softprompt evaluate`."""
    parser = VerbParser(
        "evaluate", "Score a prompt file. Without --recipe: the config of the run that made it."
    )
    parser.add_recipe_options()
    parser.add_argument(
        "--prompt", required=True, metavar="FILE", help="prompt file (.safetensors)"
    )
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument(
        "--output", metavar="FILE", help="write input, target and prediction of every row (jsonl)"
    )
    parser.add_argument(
        "--force", action="store_true", help="accept a prompt that was tuned for another backbone"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    prompt_file = Path(options.prompt)
    if not prompt_file.is_file():
        raise PromptFileError(
            f"Prompt file {prompt_file} does not exist. A run writes its best prompt to "
            "RUN_DIRECTORY/prompt/best.safetensors."
        )
    if options.recipe is None:
        options.recipe = _config_of_run(prompt_file)
    config, ds_config = tune_config(options)

    from softprompt_dist.parallel.join import join_world, leave_world

    join_world(debug=options.debug)
    from softprompt_dist.run.evaluation import ScoringRequest, evaluate

    output = Path(options.output) if options.output else None
    evaluate(config, ScoringRequest(prompt_file, options.split, output, options.force), ds_config)
    leave_world()


def _config_of_run(prompt_file: Path) -> str:
    """The config.yaml of the run directory that holds `prompt/best.safetensors`."""
    config_file = prompt_file.absolute().parent.parent / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(
            f"{prompt_file} does not lie in a run directory (there is no {config_file}), so "
            "the task is unknown. Name it with --recipe."
        )
    return str(config_file)


if __name__ == "__main__":
    run_verb(main)
