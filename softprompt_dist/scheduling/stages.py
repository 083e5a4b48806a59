"""The batch jobs that a pipeline's recipe asks for, in the order of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import read_recipe
from softprompt_dist.scheduling.batch_job import BatchJob, Part
from softprompt_dist.scheduling.batch_script import merged_options, script_options, scripts_folder
from softprompt_dist.scheduling.pipeline_config import (
    AdaptStageConfig,
    EvaluateStageConfig,
    PipelineConfig,
    StageConfig,
    TuneStageConfig,
    flat_keys,
    overrides_of,
)

SCORES = "evaluation"
"""Folder in an element's run directory."""
_SCRIPTS = {"adapt": "adapt_xxl.sh", "tune": "sweep.sh", "evaluate": "sweep.sh"}
_EXPORT = "export"


@dataclass(frozen=True)
class Element:
    """One of the runs of a sweep, as slurm/sweep.sh numbers and names them."""

    index: int
    task: str
    seed: int

    @property
    def folder(self) -> str:
        """Of its run, below that of the sweep; its scores are in `evaluation` below it."""
        return f"{self.task}-seed{self.seed}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.task}, seed {self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What the script puts in front of the arguments that it is given."""
        return [f"task.catalogue={self.task}", f"seed={self.seed}"]


@dataclass(frozen=True)
class Pipeline:
    """A recipe with the folders that it means."""

    config: PipelineConfig
    directory: Path
    """Absolute, like all paths that a job is given."""
    scripts: Path

    @classmethod
    def of(cls, config: PipelineConfig) -> Pipeline:
        """The pipeline of a recipe.

        Raises:
            ConfigError: there are no batch scripts where the recipe has them, or the directory has
                a name that cannot be told to a job.
        """
        directory = Path(config.directory or f"runs/{config.name}").absolute()
        if not str(directory).isprintable():
            # What a job waits for is told to it as lines of text.
            raise ConfigError(
                f"The pipeline's directory is {str(directory)!r}: it must not have line breaks or "
                "control characters. Set `directory` to another one."
            )
        return cls(config, directory, scripts_folder(config.scripts))

    @property
    def elements(self) -> list[Element]:
        """Of the sweep: all seeds of the first task, then those of the next."""
        tune = self.config.tune
        pairs = [(task, seed) for task in tune.tasks for seed in tune.seeds] if tune else []
        return [Element(index, task, seed) for index, (task, seed) in enumerate(pairs)]

    @property
    def adapt_folder(self) -> Path:
        """Run directory of the adaptation."""
        return self.directory / "adapt"

    @property
    def sweep_folder(self) -> Path:
        """Of the tuning runs."""
        return self.directory / "tune"

    @property
    def log_folder(self) -> Path:
        """What the jobs print."""
        return self.directory / "logs"

    def export_folder(self, stages: Sequence[AdaptConfig]) -> Path | None:
        """What is tuned on: the export of the last stage of the adaptation, if there is one."""
        tune = self.config.tune
        if tune is None or not stages:
            return None
        return Path(str(stages[-1].run_directory)).absolute() / (tune.export or _EXPORT)


def tune_overrides(pipeline: Pipeline, export: Path | None) -> list[str]:
    """What all elements of the sweep are given on top of their recipe.

    Raises:
        ConfigError: the recipe cannot be read.
    """
    tune = pipeline.config.tune
    if tune is None:
        return []
    backbone = overrides_of({"backbone.path": str(export)}) if export else []
    return backbone + _rows(tune) + overrides_of(tune.set)


def jobs_of(pipeline: Pipeline, stages: Sequence[AdaptConfig]) -> list[BatchJob]:
    """Every stage of the pipeline as a batch job.

    Args:
        pipeline: the recipe.
        stages: of its adaptation, where it has one.

    Raises:
        ConfigError: a recipe or a batch script cannot be read.
    """
    config, jobs = pipeline.config, []
    if config.adapt is not None:
        jobs.append(_adapt(pipeline, config.adapt))
    if config.tune is not None:
        jobs.append(_tune(pipeline, config.tune, stages))
    if config.tune is not None and config.evaluate is not None:
        jobs.append(_evaluate(pipeline, config.tune, config.evaluate))
    return jobs


def _rows(tune: TuneStageConfig) -> list[str]:
    """Each task's own data set, where the rows that the recipe names are one task's only."""
    task = read_recipe(tune.recipe).get("task") or {}
    source = task.get("source") or {}
    names_all = source.get("kind") == "superglue" or tune.tasks == [task.get("catalogue")]
    given = {key for key, _ in flat_keys(tune.set) if key.startswith("task.source.")}
    if "task.source.kind" in given:
        return ["task.source={}"]  # nothing of the recipe's goes with another kind
    return [] if names_all or given else ["task.source={kind: hub}"]


def _adapt(pipeline: Pipeline, stage: AdaptStageConfig) -> BatchJob:
    environment = {"RECIPE": _recipe(stage.recipe), "RUN_DIR": str(pipeline.adapt_folder)}
    parts = (Part("", pipeline.adapt_folder),)
    return _job(pipeline, "adapt", parts, environment, _set(overrides_of(stage.set)))


def _tune(pipeline: Pipeline, stage: TuneStageConfig, stages: Sequence[AdaptConfig]) -> BatchJob:
    environment = _sweep(pipeline, stage) | {"RECIPE": _recipe(stage.recipe)}
    if stages:
        steps = sum(each.steps for each in stages)  # DONE counts those of all
        environment["SOFTPROMPT_AFTER"] = f"{pipeline.adapt_folder}:{steps}"
    folder = pipeline.sweep_folder
    parts = tuple(Part(e.title, folder / e.folder, e.index) for e in pipeline.elements)
    overrides = tune_overrides(pipeline, pipeline.export_folder(stages))
    job = _job(pipeline, "tune", parts, environment, _set(overrides))
    return replace(job, parallel=stage.parallel)


def _evaluate(pipeline: Pipeline, tune: TuneStageConfig, stage: EvaluateStageConfig) -> BatchJob:
    environment = _sweep(pipeline, tune) | {"SWEEP_VERB": "evaluate"}
    folder = pipeline.sweep_folder
    parts = tuple(Part(e.title, folder / e.folder / SCORES, e.index) for e in pipeline.elements)
    arguments = ["--split", stage.split, *_set(overrides_of(stage.set))]
    job = _job(pipeline, "evaluate", parts, environment, arguments)
    return replace(job, parallel=stage.parallel or tune.parallel)


def _sweep(pipeline: Pipeline, tune: TuneStageConfig) -> dict[str, str]:
    return {
        "SWEEP_DIR": str(pipeline.sweep_folder),
        "TASKS": " ".join(tune.tasks),
        "SEEDS": " ".join(map(str, tune.seeds)),
        "SWEEP_VERB": "train",
    }


def _job(
    pipeline: Pipeline,
    name: str,
    parts: tuple[Part, ...],
    environment: dict[str, str],
    arguments: Sequence[str],
) -> BatchJob:
    stage: StageConfig = getattr(pipeline.config, name)
    script = pipeline.scripts / _SCRIPTS[name]
    own = merged_options(pipeline.config.sbatch, stage.sbatch)
    engine: list[str] = []
    if stage.deepspeed_config is None:
        # The script has a default, which an empty one takes back: the recipe decides.
        engine = ["--deepspeed_config", ""]
    else:
        environment = environment | {"DS_CONFIG": str(Path(stage.deepspeed_config).absolute())}
    log = f"{name}-%A-%a.log" if len(parts) > 1 or parts[0].index is not None else f"{name}-%j.log"
    return BatchJob(
        stage=name,
        script=script,
        name=f"{pipeline.config.name}-{name}",
        log_folder=pipeline.log_folder,
        log_name=log,
        parts=parts,
        own_options=own,
        all_options=script_options(script) | own,
        environment=environment | {"SOFTPROMPT_SLURM": str(pipeline.scripts)},
        arguments=("--", *engine, *arguments),
    )


def _set(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def _recipe(name: str) -> str:
    """A packaged recipe by its name, a file by its absolute path."""
    return str(Path(name).absolute()) if Path(name).is_file() else name
