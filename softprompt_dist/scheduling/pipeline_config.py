"""Every setting of a pipeline of batch jobs, its default and its rule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Optional

import yaml
from pydantic import field_validator, model_validator

from softprompt_dist.names import Name
from softprompt_dist.section import NotNegative, PathName, Positive, Section

_OPTION = re.compile(r"[a-z][a-z0-9]+(-[a-z0-9]+)*")
_BY_PIPELINE = {
    "array": "it is made of tasks x seeds; `parallel` says how many run at a time",
    "clusters": "one queue is asked about all jobs; submit where they shall run",
    "chdir": "jobs work in the folder that the pipeline is submitted from",
    "dependency": "it follows from the order of the stages",
    "export": "settings go to the job through its environment",
    "export-file": "settings go to the job through its environment",
    "kill-on-invalid-dep": "it is always set",
    "parsable": "it is always set",
    "test-only": "`softprompt slurm render` sets it",
    "wait": "it would keep the later stages from being submitted",
    "wrap": "the batch scripts are what runs",
}
"""Options of sbatch that are not the recipe's -> why not."""


class StageConfig(Section):
    """What the stages of a pipeline share."""

    set: dict[str, Any] = {}
    """Keys of the stage's recipe, as `--set` takes them: `optimizer.learning_rate: 0.1`, or
    `optimizer: {learning_rate: 0.1}`, which leaves the section's other keys as they are."""
    deepspeed_config: PathName | None = None
    """JSON for the engine."""
    sbatch: dict[str, Any] = {}
    """Options of sbatch by their long names, on top of those of all jobs; null takes one away."""
    gpu: str | None = None
    """As `gpu` of the pipeline, where this stage runs on other devices."""

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, values: dict[str, Any]) -> dict[str, Any]:
        return checked_options(values)

    @field_validator("set")
    @classmethod
    def _check_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        keys = dict(flat_keys(values))
        if "run_directory" in keys:
            raise ValueError(
                "run_directory follows from the pipeline's `directory`. Remove it, or set that."
            )
        if "deepspeed_config" in keys:
            raise ValueError("deepspeed_config stands beside `set`, not in it. Move it there.")
        return values


class RunStageConfig(StageConfig):
    """A stage with a recipe of its own."""

    recipe: PathName
    """A packaged one's name, or a file; of the verb that the stage runs."""


class AdaptStageConfig(RunStageConfig):
    """LM adaptation: one job of `softprompt adapt`."""


class TuneStageConfig(RunStageConfig):
    """Prompt tuning: an array of `softprompt train`, one element for each task and seed."""

    tasks: list[Name]
    """Of `softprompt tasks list`; each takes the place of the recipe's task."""
    seeds: list[NotNegative] = [0]
    """Each task is tuned with each of them."""
    parallel: Positive | None = None
    """Elements that run at a time. Default: as many as Slurm finds room for."""
    export: Name | None = None
    """After `adapt`: which of its exports is tuned on. Default: `export`; others are `export-bf16`,
    or `export-step-00010000`, where adapt's recipe asks for them."""

    @field_validator("tasks", "seeds")
    @classmethod
    def _check_list(cls, values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("it is empty, so that nothing would be tuned. Name at least one.")
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there more than once. Name each once.")
        return values

    @field_validator("set")
    @classmethod
    def _check_elements(cls, values: dict[str, Any]) -> dict[str, Any]:
        keys = dict(flat_keys(values))
        for taken, key in (("seed", "seeds"), ("task.catalogue", "tasks"), ("task.name", "tasks")):
            if taken in keys:
                raise ValueError(f"{taken} differs from element to element: set `{key}` instead.")
        return values


class EvaluateStageConfig(StageConfig):
    """Scoring: an array of `softprompt evaluate` over the prompts that were tuned."""

    split: Literal["train", "validation", "test"] = "test"
    """Of each prompt's own task."""
    parallel: Positive | None = None
    """As in `tune`, whose value is the default."""


class PipelineConfig(Section):
    """Adaptation, tuning and evaluation as batch jobs that wait for each other."""

    name: Name
    """Of the jobs and, by default, of the directory."""
    directory: PathName | None = None
    """Run directories, logs and `pipeline.json`. Default: runs/<name>."""
    scripts: PathName | None = None
    """Folder of this site's batch scripts. Default: ./slurm, else the ones of this package."""
    sbatch: dict[str, Any] = {}
    """Options of sbatch for all jobs by their long names, on top of those in the scripts."""
    gpu: str | None = None
    """A GPU that `softprompt plan` knows, such as a100-80: memory and time are predicted for it."""
    # Optional: errors find the keys of a section in unions of typing's only.
    adapt: Optional[AdaptStageConfig] = None  # noqa: UP045
    tune: Optional[TuneStageConfig] = None  # noqa: UP045
    """On what adapt exports, where there is an `adapt`."""
    evaluate: Optional[EvaluateStageConfig] = None  # noqa: UP045

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, values: dict[str, Any]) -> dict[str, Any]:
        return checked_options(values)

    @model_validator(mode="after")
    def _check_stages(self) -> PipelineConfig:
        if self.adapt is None and self.tune is None:
            raise ValueError("There is nothing to run: give `adapt`, `tune` or both.")
        if self.evaluate is not None and self.tune is None:
            raise ValueError("evaluate scores what tune has tuned. Add `tune`, or remove evaluate.")
        if self.tune is None:
            return self
        if self.adapt is None and self.tune.export is not None:
            raise ValueError(
                f"tune.export is {self.tune.export!r}, but there is no `adapt`. Name the backbone "
                "with tune.set: {backbone.path: FOLDER}."
            )
        path = dict(flat_keys(self.tune.set)).get("backbone.path")
        if self.adapt is not None and path is not None:
            raise ValueError(
                f"tune.set has backbone.path {path!r}, but tune takes what adapt exports. Remove "
                "it, or remove `adapt`."
            )
        return self


def checked_options(values: dict[str, Any]) -> dict[str, Any]:
    """Options of sbatch by name, if each may stand in a recipe.

    Raises:
        ValueError: not a long name, one that the pipeline sets itself, or no plain value.
    """
    for name, value in values.items():
        if not _OPTION.fullmatch(name):
            raise ValueError(
                f"{name!r} is no long option of sbatch. Write it as in `sbatch --help`, without "
                "the dashes in front: nodes, gpus-per-node."
            )
        # sbatch also takes a beginning for the whole name.
        for taken, reason in _BY_PIPELINE.items():
            if taken.startswith(name):
                raise ValueError(f"{name} is not the recipe's to set: {reason}. Remove it.")
        if isinstance(value, dict | list | float):
            raise ValueError(f"{name} must be one text or whole number, not {value!r}.")
        if name == "time" and isinstance(value, int):
            raise ValueError(
                f"time is the number {value}, which YAML also makes of 24:00:00. Write it in "
                f'quotes: "24:00:00", or "60" for an hour.'
            )
    return values


def flat_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b` and its value for every key of nested mappings; an empty mapping is a value."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `--set` takes them, KEY=VALUE."""
    return [f"{key}={_as_yaml(value)}" for key, value in flat_keys(settings)]


def _as_yaml(value: Any) -> str:
    """The value in YAML on one line, so that reading it gives the same value."""
    if isinstance(value, str) and "\n" in value:
        text = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True)
    else:
        text = yaml.safe_dump(
            value, default_flow_style=True, width=float("inf"), allow_unicode=True
        )
    return text.removesuffix("\n").removesuffix("\n...")
