"""The job that a command line describes: its recipe, what it needs, whether it fits the world."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.checks.finding import Finding
from softprompt_dist.config import BackboneConfig, TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import load_recipe, resolve_recipe

_OF_BITSANDBYTES = ("llm_int8", "nf4")


@dataclass(frozen=True)
class Job:
    """What is going to run; without a recipe, nothing is known of it but where it writes."""

    run_directory: Path
    config: TuneConfig | AdaptConfig | None = None

    @property
    def backbone(self) -> BackboneConfig | None:
        """How the model is found and held; None where nothing is loaded."""
        if isinstance(self.config, TuneConfig):
            return self.config.backbone
        if self.config is not None and self.config.init == "from_checkpoint":
            return BackboneConfig(
                path=self.config.backbone or "", sharding="replicated", dtype=self.config.dtype
            )
        return None

    @property
    def may_use_bf16(self) -> bool:
        """Whether it computes in bf16, as far as is known."""
        if isinstance(self.config, TuneConfig):
            return self.config.backbone.dtype == "bf16"
        return self.config is None or self.config.dtype == "bf16"

    @property
    def needs_bitsandbytes_for(self) -> str | None:
        """The setting that cannot do without bitsandbytes."""
        quantization = self.backbone.quantization if self.backbone else "none"
        used = quantization in _OF_BITSANDBYTES
        return f"backbone.quantization={quantization}" if used else None

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
        if options.overrides or options.deepspeed_config:
            raise ConfigError("--set and --deepspeed_config belong to a recipe: give --recipe.")
        return Job(Path(options.run_dir or "runs"))
    config = _adapt_config(options) if _is_adaptation(options.recipe) else _tune_config(options)
    return Job(Path(options.run_dir or config.run_directory or f"runs/{config.name}"), config)


def check_recipe(options: argparse.Namespace) -> tuple[Job, list[Finding]]:
    """The job, as far as its recipe can be read, and whether it could."""
    try:
        job = read_job(options)
    except ConfigError as error:
        job = Job(Path(options.run_dir or "runs"))
        return job, [Finding("recipe", "fail", str(options.recipe), str(error))]
    if job.config is None:
        return job, []
    kind = "train" if isinstance(job.config, TuneConfig) else "adapt"
    return job, [Finding("recipe", "ok", f"{job.config.name}, for softprompt {kind}")]


def check_world_size(job: Job, world_size: int) -> list[Finding]:
    """Whether so many ranks can deal the global batch out evenly."""
    from softprompt_dist.run.tuning import check_world

    if job.config is None:
        return []
    batch = job.config.batch
    found = (
        f"{world_size} rank(s) x {batch.micro_batch_size} rows, {batch.global_batch_size} rows a "
        "step"
    )
    try:
        check_world(job.config, world_size)
    except ConfigError as error:
        return [Finding("batch", "fail", found, str(error))]
    return [Finding("batch", "ok", found)]


def _is_adaptation(recipe: str) -> bool:
    try:
        text = resolve_recipe(recipe).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"Cannot read recipe {recipe}: {error.strerror}.") from error
    return re.search(r"^corpus:", text, re.MULTILINE) is not None


def _adapt_config(options: argparse.Namespace) -> AdaptConfig:
    if options.deepspeed_config:
        raise ConfigError("softprompt adapt takes no --deepspeed_config. Leave it out.")
    config = load_recipe(AdaptConfig, options.recipe, options.overrides)
    needed = "backbone" if config.init == "from_checkpoint" else "tokenizer"
    if getattr(config, needed) is None:
        raise ConfigError(f"init is {config.init}, so {needed} must be given.")
    return config


def _tune_config(options: argparse.Namespace) -> TuneConfig:
    from softprompt_dist.run.options import tune_config

    return tune_config(options)[0]
