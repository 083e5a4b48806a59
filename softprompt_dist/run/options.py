"""Command-line options that the verbs share, and the config they make."""

from __future__ import annotations

import argparse
from typing import Any

from softprompt_dist.backbone.engine import apply_engine_config, read_engine_config
from softprompt_dist.config import TuneConfig, load_recipe

DEMO_RECIPE = "demo"


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every verb that joins the world of ranks."""
    parser.add_argument("--recipe", help="packaged recipe name or a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one recipe key, e.g. --set optimizer.learning_rate=0.1 (repeatable)",
    )
    parser.add_argument("--run-dir", help="where the run is kept; default: runs/<name>")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and library chatter")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)


def add_engine_option(parser: argparse.ArgumentParser) -> None:
    """`--deepspeed_config`, for the verbs that load a backbone."""
    parser.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="engine plumbing; decides sharding, dtype and off-load (see ds_configs/)",
    )


def tune_config(options: argparse.Namespace) -> tuple[TuneConfig, dict[str, Any] | None]:
    """The checked recipe and the ds_config of a command line.

    Raises:
        ConfigError: see `load_recipe` and `read_engine_config`.
    """
    overrides = list(options.overrides)
    if options.run_dir:
        overrides.append(f"run_directory={options.run_dir}")
    if options.deepspeed_config:
        overrides.append(f"deepspeed_config={options.deepspeed_config}")
    config = load_recipe(TuneConfig, options.recipe, overrides)
    if config.run_directory is None:
        config = config.model_copy(update={"run_directory": f"runs/{config.name}"})
    if config.deepspeed_config is None:
        return config, None
    engine = read_engine_config(config.deepspeed_config)
    backbone = apply_engine_config(config.backbone, engine)
    return config.model_copy(update={"backbone": backbone}), engine
