"""The checked config that a verb's command line makes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from softprompt_dist.backbone.engine import apply_engine_config, read_engine_config
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.catalogue.registry import CATALOGUE, find_task
from softprompt_dist.errors import ConfigError, PromptFileError
from softprompt_dist.recipe import check_values, load_recipe
from softprompt_dist.task_config import source_at


def tune_config(options: argparse.Namespace) -> tuple[TuneConfig, dict[str, Any] | None]:
    """The recipe with all overrides, and the ds_config or None, of the shared recipe options.

    Raises:
        ConfigError: see `load_recipe` and `read_engine_config`.
    """
    return _with_engine(load_recipe(TuneConfig, options.recipe, options.overrides), options)


def prompt_config(
    options: argparse.Namespace, *, split: str | None = None
) -> tuple[TuneConfig, dict[str, Any] | None]:
    """As `tune_config`, for a verb with `--prompt`: by default the config of the run that made it.

    Args:
        options: those of `VerbParser.add_recipe_options` and `add_prompt_options`.
        split: what `--data` is, where it is a file; None for a verb without that option.

    Raises:
        ConfigError: see `tune_config`; or there is no config beside the prompt and no `--recipe`.
        PromptFileError: there is no such file.
    """
    prompt_file = Path(options.prompt)
    if not prompt_file.is_file():
        raise PromptFileError(
            f"Prompt file {prompt_file} does not exist. A run writes its best prompt to "
            "RUN_DIRECTORY/prompt/best.safetensors."
        )
    if options.recipe is None:
        options.recipe = _config_of_run(prompt_file)
    values = load_recipe(TuneConfig, options.recipe).model_dump(mode="json")
    _put_task(values, options, split)
    return _with_engine(check_values(TuneConfig, values, options.overrides), options)


def _put_task(values: dict[str, Any], options: argparse.Namespace, split: str | None) -> None:
    """Put in the task, the rows and the way of answering that the command line asks for."""
    task = _chosen_task(values, options.task)
    if split is not None and options.data is not None:
        task["source"] = _source(Path(options.data), split, task.get("source", {}))
    task["skip_bad_rows"] = task.get("skip_bad_rows", False) or options.skip_bad_rows
    # Of the run's tasks one is scored; another name for it must not clash with the rest.
    values |= {"task": task, "mixture": {}, "transfer": []}
    values["evaluation"]["method"] = options.method or values["evaluation"]["method"]


def _chosen_task(values: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The run's task, or the one called `name`: tuned in the run, or of the catalogue."""
    own: dict[str, Any] = values["task"]
    tuned = [own, *values["mixture"]["tasks"]]
    if name is None:
        return own
    key = "catalogue" if name in CATALOGUE else "name"
    for task in tuned:
        if task[key] == name:
            return task
    as_tuned = {key: own[key] for key in ("prefixed", "append_eos", "target_prefix")}
    return {"catalogue": find_task(name).name, **as_tuned}


def _with_engine(
    config: TuneConfig, options: argparse.Namespace
) -> tuple[TuneConfig, dict[str, Any] | None]:
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


def _source(data: Path, split: str, known: dict[str, Any]) -> dict[str, Any]:
    """`--data` as a source; with the train file of the run that tuned for this task, for floors."""
    source = source_at(data, split)
    train = known.get("train") if known.get("kind") == source.kind == "files" else None
    kept = {"train": train} if train is not None and Path(train).is_file() else {}
    return kept | source.model_dump(mode="json", exclude_unset=True)


def _config_of_run(prompt_file: Path) -> str:
    """The config.yaml of the run directory that holds `prompt/best.safetensors`."""
    config_file = prompt_file.absolute().parent.parent / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(
            f"{prompt_file} does not lie in a run directory (there is no {config_file}), so "
            "the task is unknown. Name it with --recipe."
        )
    return str(config_file)
