"""Whether the files that the stages read are here, and DeepSpeed takes the ds_configs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.ds_config import check_zero
from softprompt_dist.backbone.engine import read_engine_config
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job import Job
from softprompt_dist.checks.job_files import local_folder
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError, SoftpromptError
from softprompt_dist.scheduling.pipeline_config import PipelineConfig
from softprompt_dist.scheduling.recipe_checks import StageRecipes
from softprompt_dist.task_config import SourceConfig


def check_stage_files(config: PipelineConfig, recipes: StageRecipes) -> list[Finding]:
    """Corpora, backbones and ds_configs of the stages; nothing is fetched, no weight read."""
    findings: list[Finding] = []
    if recipes.adapt is not None and config.adapt is not None:
        findings += _corpora(recipes.stages)
        first = recipes.stages[0]
        if first.backbone is not None and first.init == "from_checkpoint":
            findings.append(_backbone("adapt backbone", BackboneConfig(path=first.backbone)))
        findings += _adapt_ds_config(config.adapt.deepspeed_config, recipes.adapt)
    if recipes.tune is not None and config.tune is not None and recipes.tune.config is not None:
        if recipes.adapt is None:
            findings.append(_backbone("tune backbone", recipes.tune.config.backbone))
        findings += _rows(recipes.tune.config.task.source)
        findings += _tune_ds_config("tune ds_config", recipes.tune.config.deepspeed_config)
    if config.evaluate is not None:
        findings += _tune_ds_config("evaluate ds_config", config.evaluate.deepspeed_config)
    return findings


def _corpora(stages: Sequence[AdaptConfig]) -> list[Finding]:
    from softprompt_dist.data.lm.corpus import parse_repeats

    specs = {spec for each in stages for spec in (*each.corpus, *each.validation_corpus)}
    paths = {parse_repeats(spec)[0] for spec in specs}
    missing = sorted(str(path) for path in paths if not path.exists())
    if not missing:
        return [Finding("adapt corpus", "ok", f"{len(paths)} file(s) and folder(s) are there")]
    remedy = "Set adapt.set.corpus; relative paths start where the pipeline is submitted."
    return [Finding("adapt corpus", "fail", f"missing: {', '.join(missing)}", remedy)]


def _rows(source: SourceConfig) -> list[Finding]:
    """Files of the tuned tasks; what is on the hub is not asked for."""
    splits = (source.train, source.validation, source.test)
    named = [source.path] if source.kind == "superglue" else list(splits)
    paths = [Path(name) for name in named if name and source.kind in ("files", "superglue")]
    missing = sorted(str(path) for path in paths if not path.exists())
    if not missing:
        return []
    remedy = "Set task.source in tune.set; relative paths start where the pipeline is submitted."
    return [Finding("tune rows", "fail", f"missing: {', '.join(missing)}", remedy)]


def _backbone(name: str, config: BackboneConfig) -> Finding:
    try:
        folder = local_folder(config)
    except BackboneError as error:
        return Finding(name, "fail", config.path, str(error))
    if folder is not None:
        return Finding(name, "ok", str(folder))
    remedy = (
        "Compute nodes do not ask the hub unless HF_HUB_OFFLINE=0. Fetch it once on this machine "
        "to where they see it, or name a folder."
    )
    return Finding(name, "warn", f"{config.path} has not been fetched", remedy)


def _adapt_ds_config(path: str | None, job: Job) -> list[Finding]:
    from softprompt_dist.adaptation.engine_config import engine_config

    def check() -> None:
        for stage in job.stages:
            engine_config(stage, job.ds_config, world_size=1)

    return [] if path is None else [_taken("adapt ds_config", path, check)]


def _tune_ds_config(name: str, path: str | None) -> list[Finding]:
    def check() -> None:
        zero = read_engine_config(str(path)).get("zero_optimization", {})
        check_zero(zero)

    return [] if path is None else [_taken(name, path, check)]


def _taken(name: str, path: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except SoftpromptError as error:
        return Finding(name, "fail", path, str(error))
    return Finding(name, "ok", path)
