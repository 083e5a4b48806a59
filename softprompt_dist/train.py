"""`softprompt train`: tune a soft prompt for a frozen backbone, on one rank or many.

    deepspeed --num_gpus 8 -m softprompt_dist.train --recipe t5-xxl-superglue-boolq
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt_dist.backbone.fingerprint import assert_unchanged
from softprompt_dist.config import TuneConfig, to_yaml
from softprompt_dist.errors import CheckpointError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.loop import checkpoint_store, restore, tune, validate
from softprompt_dist.run.options import (
    DEMO_RECIPE,
    add_common_options,
    add_engine_option,
    tune_config,
)
from softprompt_dist.run.outcome import count_untuned, report_outcome
from softprompt_dist.run.tuning import build_tuning_run


def build_parser() -> argparse.ArgumentParser:
    """Options of `softprompt train`."""
    parser = argparse.ArgumentParser(
        prog="softprompt train",
        description="Tune a soft prompt for a frozen backbone. Without --recipe, the demo recipe.",
    )
    add_common_options(parser)
    add_engine_option(parser)
    parser.add_argument("--steps", type=int, help="short for --set steps=N")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run directory's newest checkpoint (done anyway where there is one)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="set the run directory's checkpoints aside and begin at step 0"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the final config as YAML and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    without_recipe = options.recipe is None
    options.recipe = options.recipe or DEMO_RECIPE
    if options.steps is not None:
        options.overrides.append(f"steps={options.steps}")
    config, ds_config = tune_config(options)
    if options.dry_run:
        if ranks.is_main():
            print(to_yaml(config), end="")
        return
    if without_recipe and ranks.is_main():
        print(f"No --recipe given: running the {DEMO_RECIPE!r} recipe.", flush=True)
    join_world(debug=options.debug)
    try:
        train(config, ds_config, fresh=options.fresh, must_resume=options.resume)
    finally:
        leave_world()


def train(
    config: TuneConfig,
    ds_config: dict[str, Any] | None = None,
    *,
    fresh: bool = False,
    must_resume: bool = False,
) -> None:
    """All ranks: one run, from recipe to report, continuing where an earlier attempt stopped.

    Args:
        config: the checked recipe.
        ds_config: engine plumbing, or None for ours.
        fresh: set the directory's checkpoints aside first.
        must_resume: refuse to start at step 0.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    directory.prepare(to_yaml(config), describe_environment())
    store = checkpoint_store(config, directory)
    if fresh:
        store.discard_all()
    run = build_tuning_run(config, ds_config)
    state = restore(run, store)
    if must_resume and state.step == 0:
        raise CheckpointError(
            f"--resume was given, but {directory.checkpoints} holds no checkpoint. Check --run-dir, or "
            "leave --resume out to start at step 0."
        )
    with Journal(directory, config.steps, start_step=state.step) as journal:
        journal.say(_headline(run, state.step))
        if state.untuned_correct < 0:
            state.untuned_correct = count_untuned(run)
            validate(run, state, directory, journal)
        tune(run, state, directory, journal)
        assert_unchanged(run.backbone, run.backbone_checksum)
        report_outcome(run, state, directory, journal)


def _headline(run: Any, step: int) -> str:
    config = run.config
    start = f"resuming after step {step}" if step else "starting"
    facts = {
        "backbone": config.backbone.path,
        "sharding": config.backbone.sharding,
        "dtype": config.backbone.dtype,
        "ranks": ranks.world_size(),
        "prompt": f"{config.prompt.prompt_length} x {run.backbone.d_model}",
        "examples": {name: len(split.texts) for name, split in run.splits.items()},
    }
    return f"{config.name}: {start}, {config.steps} steps. " + json.dumps(facts)


if __name__ == "__main__":
    run_verb(main)
