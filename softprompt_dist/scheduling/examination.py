"""All checks of a pipeline, before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.checks.finding import Finding
from softprompt_dist.outcome_files import OutcomeFiles
from softprompt_dist.progress import counted, phase
from softprompt_dist.scheduling import capacity_checks, programs
from softprompt_dist.scheduling.batch_job import BatchJob, job_environment
from softprompt_dist.scheduling.file_checks import check_stage_files
from softprompt_dist.scheduling.pipeline_config import StageConfig
from softprompt_dist.scheduling.progress import StageState
from softprompt_dist.scheduling.recipe_checks import StageRecipes, check_recipes
from softprompt_dist.scheduling.stages import Pipeline, jobs_of

_SBATCH_REMEDY = (
    "Set what this cluster asks for in `sbatch` or {stage}.sbatch; `sinfo` shows partitions, nodes "
    "and limits."
)


@dataclass(frozen=True)
class Examination:
    """What is known of a pipeline without asking Slurm."""

    jobs: tuple[BatchJob, ...]
    """In order; none where a recipe is wrong."""
    findings: tuple[Finding, ...]
    export: Path | None = None
    """What is tuned on, where an adaptation makes it."""


def examine(pipeline: Pipeline) -> Examination:
    """Recipes, then files, ranks, memory and time.

    Raises:
        ConfigError: a batch script is missing.
    """
    with phase("checking the recipes"):
        recipes = check_recipes(pipeline)
    if not recipes.are_right:
        return Examination((), tuple(recipes.findings))
    jobs = jobs_of(pipeline, recipes.stages)
    with phase("checking the files"):
        findings = [*recipes.findings, *check_stage_files(pipeline.config, recipes)]
    for job in counted(jobs, "checking memory and time", "jobs"):
        findings += [
            *_capacity(pipeline, job, recipes),
            *capacity_checks.check_warning(job),
        ]
    return Examination(tuple(jobs), tuple(findings), pipeline.export_folder(recipes.stages))


def check_progress(
    found: Examination, states: Sequence[StageState], split: str | None
) -> list[Finding]:
    """What still matters of an examination, and what earlier jobs and humans have left.

    Args:
        found: of the recipe.
        states: of its stages.
        split: that is to be evaluated, if any is.
    """
    over = [state.job.stage for state in states if not state.to_submit]
    findings = [
        finding
        for finding in found.findings
        if finding.name.partition(" ")[0] not in over or finding.name.endswith(" recipe")
    ]
    for state in states:
        findings += _stopped(state)
        if state.job.stage == "tune" and state.to_submit and "adapt" in over:
            findings += _adapted(states[0], found.export)
        if state.job.stage == "evaluate" and split is not None:
            findings += _other_splits(state, split)
    return findings


def check_sbatch(
    states: Sequence[StageState], environ: Mapping[str, str], *, is_needed: bool
) -> list[Finding]:
    """Whether Slurm would take what is to be submitted; without it, whether that matters."""
    if not programs.is_installed("sbatch"):
        if not is_needed:
            return [Finding("sbatch", "ok", "not checked: it is not on PATH here")]
        remedy = "Submit from a login node of the cluster, or load its Slurm module first."
        return [Finding("sbatch", "fail", "it is not on PATH", remedy)]
    findings = []
    for state in counted(states, "asking sbatch", "jobs"):
        if state.to_submit:
            command = state.job.command(state.to_submit, test_only=True)
            environment = job_environment(environ, state.job.environment)
            is_taken, words = programs.would_take(command, environment)
            remedy = "" if is_taken else _SBATCH_REMEDY.format(stage=state.job.stage)
            name = f"{state.job.stage} sbatch"
            findings.append(Finding(name, "ok" if is_taken else "fail", words, remedy))
    return findings


def _capacity(pipeline: Pipeline, job: BatchJob, recipes: StageRecipes) -> list[Finding]:
    stage: StageConfig = getattr(pipeline.config, job.stage)
    gpu = stage.gpu or pipeline.config.gpu
    if job.stage == "adapt" and recipes.adapt is not None:
        return capacity_checks.check_adaptation(job, recipes.adapt, gpu)
    if job.stage == "tune" and recipes.tune is not None:
        adapted = recipes.stages[0].backbone if recipes.stages else None
        return capacity_checks.check_tuning(job, recipes.tune, gpu, adapted)
    return capacity_checks.check_ranks(job)[1]


def _stopped(state: StageState) -> Iterator[Finding]:
    for part in state.parts_that_are("stopped"):
        file = OutcomeFiles(part.part.directory).stop
        remedy = f"See to the reason, then remove {file} and submit again."
        name, title = f"{state.job.stage} stopped", part.part.title or state.job.stage
        yield Finding(name, "fail", f"{title}: {part.reason}", remedy)


def _adapted(adapt: StageState, export: Path | None) -> Iterator[Finding]:
    """The export of an adaptation that is done."""
    if adapt.parts_that_are("done") and export is not None and not export.is_dir():
        done = OutcomeFiles(adapt.parts[0].part.directory).done
        remedy = f"Put it back, or remove {done} to have the adaptation write it again."
        yield Finding("tune backbone", "fail", f"{export} is not there any more", remedy)


def _other_splits(state: StageState, split: str) -> Iterator[Finding]:
    """Scores that are done, but on another split than the recipe's."""
    for part in state.parts_that_are("done"):
        path = part.part.directory / "results.json"
        try:
            found = json.loads(path.read_bytes())["split"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found != split:
            told = f"{part.part.title}: {path} has scores on the {found} split"
            remedy = f"Rename {path.parent} to have them on {split}, too, or set evaluate.split."
            yield Finding("evaluate split", "fail", told, remedy)
