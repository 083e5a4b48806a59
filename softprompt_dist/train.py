"""`softprompt train`: tune a soft prompt for a frozen backbone, on one rank or many.

deepspeed --num_gpus 8 -m softprompt_dist.train --recipe t5-xxl-superglue-boolq
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt_dist import screen
from softprompt_dist.lifecycle.ownership import begin_in
from softprompt_dist.parallel import stop
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.recipe import to_yaml
from softprompt_dist.run.options import tune_config

DEMO_RECIPE = "demo"


def build_parser() -> VerbParser:
    """Options of `softprompt train`."""
    parser = VerbParser(
        "train", "Tune a soft prompt for a frozen backbone. Without --recipe: the demo recipe."
    )
    parser.add_recipe_options()
    parser.add_run_options()
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    screen.outlive_readers()
    stop.listen()  # before anything slow: a cluster may take the machine back while we load
    options = build_parser().parse_args(argv)
    if options.steps is not None:
        options.overrides.append(f"steps={options.steps}")
    without_recipe = options.recipe is None
    options.recipe = options.recipe or DEMO_RECIPE
    config, ds_config = tune_config(options)

    if not options.dry_run:
        begin_in(Path(str(config.run_directory)))
    # Only now torch and its like: a wrong option or recipe is answered at once.
    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import join_world, leave_world

    if options.dry_run:
        if ranks.is_main():
            print(to_yaml(config), end="")
        return
    if without_recipe and ranks.is_main():
        print(f"No --recipe given: running the {DEMO_RECIPE!r} recipe.", flush=True)
    join_world(debug=options.debug, limit_seconds=config.health.longest_timeout_seconds)
    from softprompt_dist.run.session import train

    train(
        config,
        ds_config,
        fresh=options.fresh,
        must_resume=options.resume,
        force=options.force,
    )
    leave_world()


if __name__ == "__main__":
    run_verb(main)
