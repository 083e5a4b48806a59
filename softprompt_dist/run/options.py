"""The checked config that a verb's command line makes."""

from __future__ import annotations

import argparse
from typing import Any

from softprompt_dist.backbone.engine import apply_engine_config, read_engine_config
from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe


def tune_config(options: argparse.Namespace) -> tuple[TuneConfig, dict[str, Any] | None]:
    """The recipe with all overrides, and the ds_config or None, of the shared recipe options.

    Raises:
        ConfigError: see `load_recipe` and `read_engine_config`.
    """
    config = load_recipe(TuneConfig, options.recipe, options.overrides)
    # As typed, not as YAML: a folder may be called 20261123 or null.
    run_directory = options.run_dir or config.run_directory or f"runs/{config.name}"
    engine_file = options.deepspeed_config or config.deepspeed_config
    config = config.model_copy(
        update={"run_directory": run_directory, "deepspeed_config": engine_file}
    )
    if config.deepspeed_config is None:
        return config, None
    engine = read_engine_config(config.deepspeed_config)
    backbone = apply_engine_config(config.backbone, engine)
    return config.model_copy(update={"backbone": backbone}), engine
