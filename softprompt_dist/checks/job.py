"""The job that a command line describes: its recipe, what it needs, whether it fits the world."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import choose_stages, is_adaptation, load_stages
from softprompt_dist.checks.finding import Finding
from softprompt_dist.config import BackboneConfig, TuneConfig
from softprompt_dist.errors import ConfigError

_OF_BITSANDBYTES = ("llm_int8", "nf4")


@dataclass(frozen=True)
class Job:
    """What is going to run; without a recipe, nothing is known of it but where it writes."""

    run_directory: Path
    config: TuneConfig | None = None
    stages: tuple[AdaptConfig, ...] = ()
    """Of an adaptation, in place of `config`; the ds_config has had its say."""
    ds_config: dict[str, Any] | None = None
    """As it was read."""

    @property
    def backbone(self) -> BackboneConfig | None:
        """How the frozen model is found and held; None where none is loaded."""
        return self.config.backbone if self.config else None

    @property
    def may_use_bf16(self) -> bool:
        """Whether it computes in bf16, as far as is known."""
        if self.backbone is not None:
            return self.backbone.dtype == "bf16"
        return not self.stages or any(stage.dtype == "bf16" for stage in self.stages)

    @property
    def needs_bitsandbytes_for(self) -> str | None:
        """The setting that cannot do without bitsandbytes."""
        quantization = self.backbone.quantization if self.backbone else "none"
        used = quantization in _OF_BITSANDBYTES
        return f"backbone.quantization={quantization}" if used else None

    def held_by(self, num_ranks: int) -> TuneConfig | None:
        """`config` with the backbone as a run on so many ranks holds it."""
        if self.config is None or self.ds_config is not None:
            return self.config
        held = self.config.backbone.held_by(num_ranks)
        return self.config.model_copy(update={"backbone": held})

    def needs_deepspeed(self, num_ranks: int) -> bool:
        """Whether so many ranks shard, off-load or train weights."""
        held = self.held_by(num_ranks)
        return bool(self.stages) if held is None else held.backbone.sharding == "zero3"

    @property
    def offload_folder(self) -> Path | None:
        """The local disk that weights are moved to and from."""
        backbone = self.backbone
        if backbone is None or backbone.offload != "nvme":
            return None
        return Path(str(backbone.offload_path))


def read_job(options: argparse.Namespace) -> Job:
    """The job of the shared recipe options (see `VerbParser.add_recipe_options`).

    Raises:
        ConfigError: the recipe, an override or the ds_config is wrong.
    """
    if options.recipe is None:
        if options.overrides or options.deepspeed_config or options.stage:
            raise ConfigError(
                "--set, --stage and --deepspeed_config belong to a recipe: give --recipe."
            )
        return Job(Path(options.run_dir or "runs"))
    if is_adaptation(options.recipe, options.overrides):
        return _adaptation(options)
    if options.stage:
        raise ConfigError(f"--stage {options.stage}: {options.recipe} has no stages. Leave it out.")
    config, ds_config = _tune_config(options)
    folder = Path(options.run_dir or config.run_directory or f"runs/{config.name}")
    return Job(folder, config, ds_config=ds_config)


def check_recipe(options: argparse.Namespace) -> tuple[Job, list[Finding]]:
    """The job, as far as its recipe can be read, and whether it could."""
    try:
        job = read_job(options)
    except ConfigError as error:
        job = Job(Path(options.run_dir or "runs"))
        return job, [Finding("recipe", "fail", str(options.recipe), str(error))]
    if job.config is not None:
        return job, [Finding("recipe", "ok", f"{job.config.name}, for softprompt train")]
    names = ", then ".join(stage.name for stage in job.stages)
    return job, [Finding("recipe", "ok", f"{names}, for softprompt adapt")] if names else []


def check_world_size(job: Job, world_size: int) -> list[Finding]:
    """Whether so many ranks can deal the global batch out evenly."""
    if job.config is not None:
        return [_batch_finding(job.config, world_size)]
    return told_once(job.stages, lambda stage: [_batch_finding(stage, world_size)])


def told_once(
    stages: Sequence[AdaptConfig], check: Callable[[AdaptConfig], Sequence[Finding]]
) -> list[Finding]:
    """What a check finds in each stage; what not all find alike bears the names of those."""
    told: dict[Finding, list[str]] = {}
    for stage in stages:
        for finding in check(stage):
            told.setdefault(finding, []).append(Path(str(stage.run_directory)).name)
    return [
        finding
        if len(names) == len(stages)
        else dataclasses.replace(finding, name=f"{finding.name} of {', '.join(names)}")
        for finding, names in told.items()
    ]


def _batch_finding(config: TuneConfig | AdaptConfig, world_size: int) -> Finding:
    from softprompt_dist.run.tuning import check_world

    batch = config.batch
    found = (
        f"{world_size} rank(s) x {batch.micro_batch_size} rows, {batch.global_batch_size} rows a "
        "step"
    )
    try:
        check_world(config, world_size)
    except ConfigError as error:
        return Finding("batch", "fail", found, str(error))
    return Finding("batch", "ok", found)


def _adaptation(options: argparse.Namespace) -> Job:
    from softprompt_dist.adaptation.engine_config import apply_ds_config, read_ds_config

    stages = load_stages(options.recipe, options.overrides, options.run_dir)
    stages = choose_stages(stages, options.stage)
    ds_config = None
    if options.deepspeed_config:
        ds_config = read_ds_config(options.deepspeed_config)
        stages = [apply_ds_config(stage, ds_config) for stage in stages]
    folder = Path(str(stages[0].run_directory))
    return Job(folder, stages=tuple(stages), ds_config=ds_config)


def _tune_config(options: argparse.Namespace) -> tuple[TuneConfig, dict[str, Any] | None]:
    from softprompt_dist.run.options import tune_config

    return tune_config(options)
