"""`softprompt adapt`: train all weights of a language model on plain text, on one rank or many.

deepspeed --num_gpus 8 -m softprompt_dist.adapt --recipe paper-512-512 \
    --set backbone=google/t5-v1_1-xxl --set corpus='[c4-tokens]' --deepspeed_config zero2.json
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import choose_stages, load_stages
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.recipe import to_yaml


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
    options = build_parser().parse_args(argv)
    if options.recipe is None:
        raise ConfigError("softprompt adapt needs --recipe, such as --recipe paper-512-512.")
    overrides = list(options.overrides)
    if options.steps is not None:
        overrides.append(f"steps={options.steps}")
    stages = choose_stages(load_stages(options.recipe, overrides, options.run_dir), options.stage)
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
    join_world(debug=options.debug)
    # Numbers too small to matter slow a CPU down tenfold.
    torch.set_flush_denormal(True)
    if options.fresh and not options.export:
        ranks.on_main(lambda: _check_free(stages))
    for number, config in enumerate(stages):
        # A run that has begun may not have come to its later stages yet.
        if not _run(config, options, must_resume=options.resume and number == 0):
            break
        gc.collect()
    leave_world()


def _run(config: AdaptConfig, options: argparse.Namespace, *, must_resume: bool) -> bool:
    """All ranks: one stage; whether the next may begin."""
    from softprompt_dist.adaptation.engine_config import apply_ds_config, read_ds_config
    from softprompt_dist.adaptation.session import adapt, export_newest
    from softprompt_dist.parallel import ranks

    path = options.deepspeed_config
    ds_config = ranks.together(lambda: read_ds_config(path)) if path else None
    if ds_config is not None:
        config = ranks.together(lambda: apply_ds_config(config, ds_config))
    if options.export:
        export_newest(config, ds_config, options.export)
        return True
    return adapt(config, ds_config, fresh=options.fresh, must_resume=must_resume)


def _check_free(stages: Sequence[AdaptConfig]) -> None:
    """Before any checkpoint is set aside, and not after the stages before."""
    from softprompt_dist.adaptation.exporting import check_free

    for config in stages:
        check_free(config, Path(str(config.run_directory)))


def _folder(text: str) -> Path:
    path = Path(text).absolute()
    if not text or not path.name:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder that can be made")
    return path


if __name__ == "__main__":
    run_verb(main)
