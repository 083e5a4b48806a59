"""A recipe of several adaptations, each of which begins with what the one before it exported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.names import RULE, is_name, path_inside
from softprompt_dist.recipe import apply_override, check_values, read_recipe

STAGES = "stages"


def is_adaptation(recipe: str, overrides: Sequence[str] = ()) -> bool:
    """Whether a recipe is one of `softprompt adapt`, by the keys that it and overrides set.

    Raises:
        ConfigError: the recipe cannot be read.
    """
    keys = {*read_recipe(recipe), *(re.split(r"[.=]", each)[0] for each in overrides)}
    adapt, tune = {STAGES, *AdaptConfig.model_fields}, set(TuneConfig.model_fields)
    return len(keys & (adapt - tune)) > len(keys & (tune - adapt))


def load_stages(
    recipe: str, overrides: Sequence[str] = (), run_directory: str | None = None
) -> list[AdaptConfig]:
    """The adaptations of a recipe, in order, each with its run directory; most recipes have one.

    Keys beside `stages` are those of all stages; a stage's own come on top. `--set key=value`
    changes all stages, `--set stages.NAME.key=value` one. Each has a folder of its own in the run
    directory, and only the first has a say in what it starts from.

    Raises:
        ConfigError: the recipe cannot be read, any key or value of any stage is wrong, or the first
            does not say what it starts from.
    """
    values = read_recipe(recipe)
    own = [o for o in overrides if o.startswith(f"{STAGES}.")]
    common = [o for o in overrides if o not in own]
    if STAGES not in values:
        config = check_values(AdaptConfig, values, overrides, name=recipe)
        check_start(config)
        own_folder = run_directory or config.run_directory or f"runs/{config.name}"
        return [config.model_copy(update={"run_directory": own_folder})]
    names = _checked_names(recipe, values[STAGES])
    for override in own:
        _check_stage(override.split(".")[1], names)
        apply_override(values, override)
    _checked_names(recipe, values[STAGES])
    return _chained(values, common, run_directory, recipe)


def _chained(
    values: dict[str, Any], overrides: Sequence[str], run_directory: str | None, recipe: str
) -> list[AdaptConfig]:
    """The stages of a recipe's values, each with its folder and its start."""
    stages = values.pop(STAGES)
    for override in overrides:
        apply_override(values, override)
    name_of_all = values.get("name", AdaptConfig.model_fields["name"].default)
    if not is_name(name_of_all):
        raise ConfigError(
            f"{recipe}: name is {name_of_all!r:.100}, but {RULE}. Choose another one."
        )
    folder = Path(run_directory or _own_folder(values, recipe) or f"runs/{name_of_all}")
    configs: list[AdaptConfig] = []
    previous: Path | None = None
    for name, own in stages.items():
        merged = _merged(values, own)
        for override in overrides:
            apply_override(merged, override)
        own_folder = path_inside(folder, name, error=ConfigError)
        merged |= {"run_directory": str(own_folder), "name": f"{name_of_all}-{name}"}
        if previous is not None:
            merged |= {"init": "from_checkpoint", "backbone": f"{previous}/export"}
        configs.append(check_values(AdaptConfig, merged, name=f"Stage {name!r} of {recipe}"))
        previous = own_folder
    check_start(configs[0])
    return configs


def _own_folder(values: dict[str, Any], recipe: str) -> str | None:
    folder = values.get("run_directory")
    if not isinstance(folder, str | None):
        raise ConfigError(f"{recipe}: run_directory is {folder!r:.100}, and must be a path.")
    return folder


def check_start(config: AdaptConfig) -> None:
    """Whether the recipe says what the model is made of.

    Raises:
        ConfigError: it leaves out what its `init` needs.
    """
    if config.init == "from_checkpoint" and config.backbone is None:
        raise ConfigError(
            "init is from_checkpoint, so `backbone` must name a checkpoint: "
            "--set backbone=google/t5-v1_1-base, or a folder."
        )
    if config.init == "from_config" and config.tokenizer is None:
        raise ConfigError(
            "init is from_config, so `tokenizer` must name a T5 tokenizer folder: "
            "--set tokenizer=FOLDER."
        )


def choose_stages(configs: Sequence[AdaptConfig], name: str | None) -> list[AdaptConfig]:
    """All stages, or the one whose folder has that name.

    Raises:
        ConfigError: there is no such stage.
    """
    if name is None:
        return list(configs)
    names = [Path(str(config.run_directory)).name for config in configs]
    _check_stage(name, names)
    return [configs[names.index(name)]]


def _checked_names(recipe: str, stages: Any) -> list[str]:
    """Names of the stages; those without keys get none to be added to."""
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(
            f"{recipe}: `{STAGES}` must be a mapping of names to the keys of each stage."
        )
    wrong = [
        name
        for name, keys in stages.items()
        # A dot would end the stage's name in `--set stages.NAME.key=value`.
        if not (is_name(name) and "." not in name and isinstance(keys, dict | None))
    ]
    if wrong:
        raise ConfigError(
            f"{recipe}: {', '.join(map(repr, wrong))} is no stage: a name of letters, digits, `-` "
            "and `_` (in quotes, where YAML would read a number) with a mapping of keys."
        )
    stages.update({name: {} for name, keys in stages.items() if keys is None})
    return list(stages)


def _check_stage(name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        nearest = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"There is no stage {name!r}.{nearest} Stages: {', '.join(names)}.")


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(common)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
