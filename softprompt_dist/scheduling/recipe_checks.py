"""Whether the recipes, tasks and ds_configs of a pipeline's stages are right."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import is_adaptation
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job import Job, read_job
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.catalogue.registry import find_task
from softprompt_dist.errors import ConfigError, DataError, SoftpromptError
from softprompt_dist.recipe import check_values
from softprompt_dist.scheduling.pipeline_config import RunStageConfig, TuneStageConfig, overrides_of
from softprompt_dist.scheduling.stages import Element, Pipeline, tune_overrides


@dataclass
class StageRecipes:
    """What the stages run, as far as their recipes are right; the ds_configs have had their say."""

    adapt: Job | None = None
    tune: Job | None = None
    """Of the first element; the others differ in task and seed."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def stages(self) -> tuple[AdaptConfig, ...]:
        """Of the adaptation."""
        return self.adapt.stages if self.adapt else ()

    @property
    def are_right(self) -> bool:
        """Whether jobs can be made of them."""
        return all(finding.status != "fail" for finding in self.findings)


def check_recipes(pipeline: Pipeline) -> StageRecipes:
    """Read the recipes of all stages."""
    config, found = pipeline.config, StageRecipes()
    if config.adapt is not None:
        found.adapt = _read(found.findings, "adapt", lambda: _adapt(pipeline))
    if config.tune is not None:
        tasks = [_task(name) for name in config.tune.tasks]
        found.findings += [finding for finding in tasks if finding is not None]
    if config.tune is not None and found.are_right:
        found.tune = _read(found.findings, "tune", lambda: _tune(pipeline, found.stages))
    tune = found.tune
    if config.evaluate is not None and tune is not None:
        _read(found.findings, "evaluate", lambda: _evaluate(pipeline, tune))
    return found


def _read(findings: list[Finding], stage: str, work: Callable[[], tuple[Job, str]]) -> Job | None:
    """The job that `work` makes, and a finding about it."""
    name = f"{stage} recipe"
    try:
        job, told = work()
    except SoftpromptError as error:
        findings.append(Finding(name, "fail", "cannot be used", str(error)))
        return None
    findings.append(Finding(name, "ok", told))
    return job


def _task(name: str) -> Finding | None:
    try:
        find_task(name)
    except DataError as error:
        return Finding("tune tasks", "fail", name, str(error))
    return None


def _adapt(pipeline: Pipeline) -> tuple[Job, str]:
    stage = pipeline.config.adapt
    assert stage is not None
    overrides = overrides_of(stage.set)
    _check_verb(stage.recipe, overrides, "adapt")
    job = read_job(_options(stage, overrides, pipeline.adapt_folder))
    names = ", then ".join(f"{each.name} ({each.steps:,} steps)" for each in job.stages)
    return job, names


def _tune(pipeline: Pipeline, stages: Sequence[AdaptConfig]) -> tuple[Job, str]:
    """All elements are read, for a setting may go with one task and not with another."""
    stage = pipeline.config.tune
    assert stage is not None
    export = pipeline.export_folder(stages)
    if export is not None:
        _check_export(export.name, stages[-1])
    given = tune_overrides(pipeline, export)
    _check_verb(stage.recipe, given, "train")
    jobs = [_element(pipeline, stage, each, given) for each in pipeline.elements]
    first = jobs[0].config
    assert first is not None
    told = f"{len(stage.tasks)} task(s) x {len(stage.seeds)} seed(s), {first.steps:,} steps"
    return jobs[0], f"{told}, on {first.backbone.path}"


def _element(
    pipeline: Pipeline, stage: TuneStageConfig, element: Element, given: Sequence[str]
) -> Job:
    overrides = [*element.overrides, *given]
    try:
        return read_job(_options(stage, overrides, pipeline.sweep_folder / element.folder))
    except ConfigError as error:
        raise ConfigError(f"{element.title}: {error}") from error


def _evaluate(pipeline: Pipeline, tune: Job) -> tuple[Job, str]:
    """Settings on top of what the tuning run has kept of its own."""
    stage = pipeline.config.evaluate
    assert stage is not None
    assert tune.config is not None
    values = tune.config.model_dump(mode="json")
    check_values(TuneConfig, values, overrides_of(stage.set), name="evaluate.set")
    return tune, f"{len(pipeline.elements)} prompt(s) on the {stage.split} split"


def _check_verb(recipe: str, overrides: Sequence[str], verb: str) -> None:
    found = "adapt" if is_adaptation(recipe, overrides) else "train"
    if found != verb:
        raise ConfigError(
            f"{recipe} is a recipe of softprompt {found}, and this stage runs softprompt {verb}. "
            "Name another recipe."
        )


def _check_export(name: str, last: AdaptConfig) -> None:
    """That the last stage of the adaptation leaves an export of this name."""
    dtypes = list(dict.fromkeys(last.export.dtypes))
    steps = [f"-step-{step:08d}" for step in last.export.steps if step < last.steps]
    made = [
        f"export{step}{'' if dtype == dtypes[0] else f'-{dtype}'}"
        for step in ("", *steps)
        for dtype in dtypes
    ]
    if name not in made:
        raise ConfigError(
            f"tune.export is {name!r}, but {last.name} leaves {', '.join(made)}. Name one of them, "
            "or ask for it with export.steps and export.dtypes in adapt.set."
        )


def _options(stage: RunStageConfig, overrides: Sequence[str], folder: Path) -> argparse.Namespace:
    """A command line of the stage's verb."""
    return argparse.Namespace(
        recipe=stage.recipe,
        overrides=list(overrides),
        run_dir=str(folder),
        deepspeed_config=stage.deepspeed_config,
        stage=None,
    )
