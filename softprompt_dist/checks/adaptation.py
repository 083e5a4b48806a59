"""What `softprompt adapt` reads and how far it is; nothing is fetched, no weight or token read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.exporting import check_free
from softprompt_dist.adaptation.source import source_in
from softprompt_dist.backbone.architecture import Architecture, architecture_of
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.backbone.load import load_tokenizer
from softprompt_dist.backbone.weight_files import checkpoint_files
from softprompt_dist.cache import cache_directory
from softprompt_dist.checks.adaptation_room import (
    check_disk_room,
    check_engine,
    check_memory_room,
    engine_of,
)
from softprompt_dist.checks.disk import check_read_speed
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job import Job, told_once
from softprompt_dist.checks.job_files import (
    check_tokenizer,
    check_weights,
    find_backbone,
    tried,
)
from softprompt_dist.checks.world import World
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.lm.corpus import built_corpora, open_corpus, parse_repeats
from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.shards import ConcatenatedTokens
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.text_sources import file_source
from softprompt_dist.data.lm.token_source import TokenSource
from softprompt_dist.errors import BackboneError, ConfigError
from softprompt_dist.run.checkpoint_folder import CheckpointFolder
from softprompt_dist.run.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNTED_DOCUMENTS = 20_000_000
"""Up to so many the rows are counted here: it reads where each document begins."""


@dataclass(frozen=True)
class _Start:
    """What is known of the model before it is loaded."""

    tokenizer: PreTrainedTokenizerBase | None = None
    architecture: Architecture | None = None


def check_adaptation(job: Job, world: World) -> list[Finding]:
    """All stages of a recipe; what several find alike is told once."""
    start, findings = _check_start(job.stages[0])

    def check(stage: AdaptConfig) -> list[Finding]:
        tokenizer = _own_tokenizer(stage) or start.tokenizer
        return _check_stage(job, stage, replace(start, tokenizer=tokenizer), world)

    findings += told_once(job.stages, check)
    return findings + check_disk_room(job.stages, start.architecture)


def _check_start(config: AdaptConfig) -> tuple[_Start, list[Finding]]:
    """Checkpoint and tokenizer that the first stage begins with."""
    folder: Path | None = None
    findings: list[Finding] = []
    if config.init == "from_checkpoint":
        backbone = BackboneConfig(path=config.backbone or "", dtype=config.dtype)
        folder, findings = find_backbone(backbone)
        if folder is None:
            return _Start(architecture=known_architecture(backbone.path)), findings
        findings = [check_weights(folder, backbone)]
        if findings[0].status != "fail":
            findings += check_read_speed("backbone speed", checkpoint_files(folder))
    starts: list[_Start] = []

    def describe() -> str:
        source = source_in(folder, config)
        values = source.hf_config.to_dict()
        try:
            architecture = architecture_of(config.backbone or "the model", values)
        except BackboneError:
            architecture = None
        starts.append(_Start(source.tokenizer, architecture))
        weights = f", {architecture.num_parameters:,} weights" if architecture else ""
        return f"{source.hf_config.model_type}{weights}; {len(source.tokenizer):,} pieces"

    findings.append(tried("model", describe))
    return (starts[0] if starts else _Start()), findings


def _own_tokenizer(config: AdaptConfig) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(Path(config.tokenizer)) if config.tokenizer else None
    except BackboneError:
        return None  # `check_tokenizer` tells why


def _check_stage(job: Job, config: AdaptConfig, start: _Start, world: World) -> list[Finding]:
    engine = engine_of(config, job.ds_config)
    findings = [tried("steps", lambda: _steps(config)), check_engine(config, engine, world)]
    if config.tokenizer:
        findings.append(check_tokenizer(Path(config.tokenizer)))
    corpora: list[TokenSource] = []
    findings.append(tried("corpus", lambda: _corpus(config.corpus, start, corpora)))
    if config.validation_corpus:
        findings.append(
            tried("validation corpus", lambda: _corpus(config.validation_corpus, start))
        )
    if start.tokenizer is not None:
        findings.append(tried("rows", lambda: _rows(config, start, corpora)))
    return findings + check_memory_room(config, engine, start.architecture, world)


def _steps(config: AdaptConfig) -> str:
    """How far the run is; one that begins must find its export folders free."""
    directory = RunDirectory(Path(str(config.run_directory)))
    published = CheckpointFolder(directory.checkpoints, keep_last=1).published()
    if not published:
        check_free(config, directory.path)
        return f"0 of {config.steps:,} done"
    done = published[-1][0]
    if done > config.steps:
        raise ConfigError(
            f"steps is {config.steps}, but {directory.path} has done {done} already. Raise steps, "
            "export what there is with --export FOLDER, or start over with --fresh."
        )
    return f"{done:,} of {config.steps:,} done, by the newest checkpoint in {directory.path}"


def _corpus(specs: Sequence[str], start: _Start, opened: list[TokenSource] | None = None) -> str:
    """What there is; corpora that are built whole go to `opened`."""
    folders = [spec for spec in specs if parse_repeats(spec)[0].is_dir()]
    files = [file_source(parse_repeats(spec)[0]) for spec in specs if spec not in folders]
    parts = []
    if folders:
        source = _built(folders, start)
        tokens = f"{source.num_tokens:,} tokens in {source.num_documents:,} documents"
        parts.append(f"{len(folders)} built, {tokens}")
        if opened is not None and not files:
            opened.append(source)
    if files:
        size = sum(file.num_bytes or 0 for file in files)
        parts.append(
            f"{len(files)} text file(s), {size / 1e6:,.1f} MB, tokenised before the first step"
        )
    return "; ".join(parts)


def _built(specs: Sequence[str], start: _Start) -> TokenSource:
    if start.tokenizer is not None:
        return open_corpus(specs, start.tokenizer, cache_directory() / "corpora")
    parts: list[TokenSource] = []
    for path, repeats in map(parse_repeats, specs):
        parts += [*built_corpora(path)] * repeats
    return ConcatenatedTokens(parts, fingerprint="")


def _rows(config: AdaptConfig, start: _Start, corpora: Sequence[TokenSource]) -> str:
    """Whether the objective suits the tokenizer, and the text fills one batch."""
    special = SpecialIds.of(start.tokenizer, config.objective)
    batch = config.batch.global_batch_size
    if not corpora or corpora[0].num_documents > _COUNTED_DOCUMENTS:
        return f"{config.objective}, {batch:,} a step; not counted here"
    data = LMData(corpora[0], special, config)
    data.require_rows(batch)
    epochs = config.steps * data.plan(0, batch).examples_consumed / data.num_examples
    return (
        f"{config.objective}, {batch:,} a step; {data.num_examples:,} examples, read about "
        f"{epochs:.3g} times in {config.steps:,} steps"
    )
