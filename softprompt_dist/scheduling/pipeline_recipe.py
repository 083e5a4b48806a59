"""A pipeline's recipe: where it lies, and what a recipe of another verb is told."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import is_adaptation
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import check_values, read_recipe, recipe_names
from softprompt_dist.scheduling.pipeline_config import PipelineConfig

_STAGES = ("adapt", "tune", "evaluate")


def load_pipeline(recipe: str, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline by packaged name or path, apply `a.b=value` overrides, check everything.

    Raises:
        ConfigError: missing, unreadable, of another verb, or any key or value is wrong.
    """
    values = read_recipe(_file_of(recipe))
    _refuse_other_verbs(recipe, values)
    return check_values(PipelineConfig, values, overrides, name=recipe)


def pipeline_names() -> list[str]:
    """Names of the packaged pipelines."""
    return sorted(path.stem for path in _packaged().glob("*.yaml"))


def _packaged() -> Path:
    return Path(str(resources.files("softprompt_dist") / "recipes" / "pipelines"))


def _file_of(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = _packaged() / f"{recipe}.yaml"
    if packaged.is_file():
        return packaged
    if recipe in recipe_names():
        raise ConfigError(_of_another_verb(recipe, _verb_of(recipe)))
    names = pipeline_names()
    close = difflib.get_close_matches(recipe, names, n=1)
    nearest = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"Pipeline {recipe!r} is neither a file nor packaged.{nearest} Packaged: "
        f"{', '.join(names)}. Paths start at {Path.cwd()}."
    )


def _refuse_other_verbs(recipe: str, values: dict[str, Any]) -> None:
    """What names no stage but has a run's own keys is meant for another verb."""
    others = {"stages", *AdaptConfig.model_fields, *TuneConfig.model_fields}
    foreign = values.keys() & (others - PipelineConfig.model_fields.keys())
    if foreign and not values.keys() & set(_STAGES):
        raise ConfigError(_of_another_verb(recipe, _verb_of(recipe)))


def _verb_of(recipe: str) -> str:
    return "adapt" if is_adaptation(recipe) else "train"


def _of_another_verb(recipe: str, verb: str) -> str:
    stage = "adapt" if verb == "adapt" else "tune"
    return (
        f"{recipe} is a recipe of softprompt {verb}. A pipeline names stages; write one with\n"
        f"    name: my-pipeline\n    {stage}: {{recipe: {recipe}"
        + (", tasks: [boolq], seeds: [0]}" if stage == "tune" else "}")
    )
