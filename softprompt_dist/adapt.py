"""`softprompt adapt`: train all weights of a language model on plain text, on one rank or many.

deepspeed --num_gpus 8 -m softprompt_dist.adapt --recipe paper-512-512 \
    --set backbone=google/t5-v1_1-xxl --set corpus='[c4-tokens]' --deepspeed_config zero2.json
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt_dist import screen
from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import STAGES, choose_stages, load_stages
from softprompt_dist.errors import ConfigError
from softprompt_dist.lifecycle.ownership import begin_in, refuse_if_in_use
from softprompt_dist.parallel import stop
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.recipe import read_recipe, to_yaml


def build_parser() -> VerbParser:
    """Options of `softprompt adapt`."""
    parser = VerbParser("adapt", "Train all weights of a language model on plain text.")
    parser.add_recipe_options()
    parser.add_run_options()
    parser.add_argument(
        "--stage", metavar="NAME", help="of a recipe with several, run this one only"
    )
    parser.add_argument(
        "--export",
        metavar="FOLDER",
        type=_folder,
        help="only write the newest checkpoint as a Hugging Face folder",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    screen.outlive_readers()
    stop.listen()  # before anything slow: a cluster may take the machine back while we load
    options = build_parser().parse_args(argv)
    every = _all_stages(options)
    stages = choose_stages(every, options.stage)
    if options.export and len(stages) > 1:
        raise ConfigError(
            f"--export writes one stage, but {options.recipe} has {len(stages)}. Add --stage NAME."
        )

    # Only now torch and its like: a wrong option or recipe is answered at once.
    import torch

    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import join_world, leave_world

    if options.dry_run:
        if ranks.is_main():
            print("---\n".join(map(to_yaml, stages)), end="")
        return
    folder, _ = _folder_of_run(options.recipe, every)
    if options.export:
        stop.forget()  # there is nothing to save: a signal ends this as it does any command
        refuse_if_in_use(folder)  # a run that goes on removes what is read here
    else:
        begin_in(folder)
    limit = max(stage.health.longest_timeout_seconds for stage in stages)
    join_world(debug=options.debug, limit_seconds=limit)
    # Numbers too small to matter slow a CPU down tenfold.
    torch.set_flush_denormal(True)
    if options.export:
        _export(stages[0], options)
    else:
        _adapt(every, stages, options)
    leave_world()


def _all_stages(options: argparse.Namespace) -> list[AdaptConfig]:
    if options.recipe is None:
        raise ConfigError("softprompt adapt needs --recipe, such as --recipe paper-512-512.")
    overrides = list(options.overrides)
    if options.steps is not None:
        overrides.append(f"steps={options.steps}")
    return load_stages(options.recipe, overrides, options.run_dir)


def _folder_of_run(recipe: str, every: Sequence[AdaptConfig]) -> tuple[Path, str]:
    """Of all stages together, each of which has its own folder in it; and the run's name."""
    own, name = Path(str(every[0].run_directory)), every[0].name
    if STAGES not in read_recipe(recipe):
        return own, name
    return own.parent, name.removesuffix(f"-{own.name}")


def _adapt(
    every: Sequence[AdaptConfig], stages: Sequence[AdaptConfig], options: argparse.Namespace
) -> None:
    """All ranks: the stages that were chosen of all that there are."""
    from softprompt_dist.adaptation.session import adapt_stage, set_aside
    from softprompt_dist.lifecycle.attempt import Attempt

    first = every.index(stages[0])
    before = sum(config.steps for config in every[:first])
    total = before + sum(config.steps for config in stages)
    folder, name = _folder_of_run(options.recipe, every)
    facts = {"verb": "adapt", "name": name, "steps": total}
    with Attempt(folder, stages[0].health, facts) as attempt:
        attempt.steps_before = before
        if attempt.begins_anew(options.fresh):
            set_aside(stages, attempt)
        for number, stage in enumerate(stages):
            config, ds_config = _with_ds_config(stage, options)
            attempt.health = config.health
            attempt.note(stage=config.name)
            # A run that has begun may not have come to its later stages yet.
            must_resume = options.resume and number == 0
            adapt_stage(config, ds_config, attempt, must_resume=must_resume, force=options.force)
            attempt.steps_before += config.steps
            gc.collect()
        attempt.finish(0)


def _export(stage: AdaptConfig, options: argparse.Namespace) -> None:
    """All ranks: the newest checkpoint of a stage."""
    from softprompt_dist.adaptation.session import export_newest
    from softprompt_dist.lifecycle.watchdog import watched

    config, ds_config = _with_ds_config(stage, options)
    with watched(Path(str(config.run_directory)) / "stacks", config.health):
        export_newest(config, ds_config, options.export, force=options.force)


def _with_ds_config(
    config: AdaptConfig, options: argparse.Namespace
) -> tuple[AdaptConfig, dict[str, Any] | None]:
    """All ranks: a stage, and the ds_config that was applied to it."""
    from softprompt_dist.adaptation.engine_config import apply_ds_config, read_ds_config
    from softprompt_dist.parallel import ranks

    path = options.deepspeed_config
    if not path:
        return config, None
    ds_config = ranks.together(lambda: read_ds_config(path))
    return ranks.together(lambda: apply_ds_config(config, ds_config)), ds_config


def _folder(text: str) -> Path:
    path = Path(text).absolute()
    if not text or not path.name:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder that can be made")
    return path


if __name__ == "__main__":
    run_verb(main)
