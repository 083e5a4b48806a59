"""`softprompt adapt`: train all weights of a T5 v1.1 on plain text, on one rank or many.

python -m softprompt_dist.adapt --recipe adapt-tiny-t5-span --run-dir runs/adapt-tiny-t5-span
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.recipe import load_recipe, to_yaml


def build_parser() -> VerbParser:
    """Options of `softprompt adapt`."""
    parser = VerbParser("adapt", "Train all weights of a T5 v1.1 on plain text.")
    parser.add_recipe_options()
    parser.add_run_options()
    parser.add_argument(
        "--export",
        metavar="FOLDER",
        help="only write the newest checkpoint as a Hugging Face folder",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    if options.recipe is None:
        raise ConfigError("softprompt adapt needs --recipe, such as --recipe adapt-tiny-t5-span.")
    if options.deepspeed_config:
        raise ConfigError(
            "softprompt adapt keeps the weights whole on every rank, without --deepspeed_config. "
            "Leave that out; set dtype and batch in the recipe."
        )
    overrides = list(options.overrides)
    if options.steps is not None:
        overrides.append(f"steps={options.steps}")
    config = load_recipe(AdaptConfig, options.recipe, overrides)
    run_directory = options.run_dir or config.run_directory or f"runs/{config.name}"
    config = config.model_copy(update={"run_directory": run_directory})

    # Only now torch and its like: a wrong option or recipe is answered at once.
    import torch

    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import join_world, leave_world

    if options.dry_run:
        if ranks.is_main():
            print(to_yaml(config), end="")
        return
    join_world(debug=options.debug)
    from softprompt_dist.run.adaptation_session import adapt, export_newest

    # Numbers too small to matter slow a CPU down tenfold.
    torch.set_flush_denormal(True)
    if options.export:
        export_newest(config, Path(options.export))
    else:
        adapt(config, fresh=options.fresh, must_resume=options.resume)
    leave_world()


if __name__ == "__main__":
    run_verb(main)
