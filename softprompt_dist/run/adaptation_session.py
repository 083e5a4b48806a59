"""One adaptation from recipe to exported folder, in a world that was joined already."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.load import load_tokenizer, locate_backbone
from softprompt_dist.backbone.t5_v11 import T5V11, new_t5, read_t5
from softprompt_dist.cache import cache_directory
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.corpus import TokenisedCorpus, tokenise_corpus
from softprompt_dist.data.denoising import DenoisingData, SpecialIds
from softprompt_dist.errors import CheckpointError, ConfigError, NonFiniteLossError
from softprompt_dist.parallel import ranks
from softprompt_dist.recipe import to_yaml
from softprompt_dist.run.adaptation import (
    AdaptationRun,
    StopRequest,
    restore,
    save,
    update_weights,
    validation_loss,
)
from softprompt_dist.run.adaptation_export import export
from softprompt_dist.run.checkpoint import CheckpointStore
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.tuning import check_world

log = logging.getLogger(__name__)

EMBEDDING_ROWS_MULTIPLE = 64


def adapt(config: AdaptConfig, *, fresh: bool = False, must_resume: bool = False) -> None:
    """All ranks: one run, from recipe to export, continuing where an earlier attempt stopped.

    Args:
        config: the checked recipe, with its run directory.
        fresh: set the directory's checkpoints aside first.
        must_resume: refuse to start at step 0.

    Raises:
        SoftpromptError: anything in the recipe, corpus, backbone or machine that cannot work.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    directory.create()
    run = build_adaptation_run(config)
    store = CheckpointStore(directory.checkpoints, config.checkpoint.keep_last)
    if fresh:
        store.discard_all()
    if not restore(run, store) and must_resume:
        raise _nothing_to_resume(directory)
    directory.record(to_yaml(config), describe_environment())
    with Journal(directory, config.steps, start_step=run.step) as journal, StopRequest() as stop:
        journal.say(_headline(run))
        if _train(run, store, stop, directory, journal):
            export(run, directory.path / "export")
            journal.say(f"Exported to {directory.path / 'export'}.")
        else:
            journal.say(f"Asked to stop; saved after step {run.step}. The same command continues.")


def export_newest(config: AdaptConfig, folder: Path) -> None:
    """All ranks: write the newest checkpoint as a Hugging Face folder, and train nothing.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    run = build_adaptation_run(config)
    if not restore(run, CheckpointStore(directory.checkpoints, config.checkpoint.keep_last)):
        raise _nothing_to_resume(directory)
    export(run, folder)


def build_adaptation_run(config: AdaptConfig) -> AdaptationRun:
    """All ranks: model, tokenizer and data of a recipe, ready for the first update.

    Raises:
        ConfigError: the recipe leaves out what its `init` needs, or the world size does not fit.
        DataError: a corpus file is missing, unreadable or too short.
        BackboneError: the checkpoint to start from is unreadable or incomplete.
    """
    check_world(config, ranks.world_size())
    source = _source_folder(config)
    tokenizer_folder = Path(config.tokenizer) if config.tokenizer else source
    assert tokenizer_folder is not None
    tokenizer = ranks.together(lambda: load_tokenizer(tokenizer_folder))
    special = ranks.together(lambda: SpecialIds.of(tokenizer))
    train = _tokenise(config.corpus, tokenizer)
    validation = (
        _tokenise(config.validation_corpus, tokenizer) if config.validation_corpus else None
    )
    return AdaptationRun(
        config=config,
        tokenizer=tokenizer,
        model=ranks.together(lambda: _model(config, source, len(tokenizer))),
        train=ranks.together(lambda: DenoisingData(train, special, config)),
        validation=ranks.together(
            lambda: DenoisingData(validation, special, config) if validation else None
        ),
        corpus_fingerprint=train.fingerprint,
        source_folder=source,
    )


def _source_folder(config: AdaptConfig) -> Path | None:
    if config.init == "from_config":
        if config.tokenizer is None:
            raise ConfigError(
                "init is from_config, so `tokenizer` must name a T5 tokenizer folder."
            )
        return None
    if config.backbone is None:
        raise ConfigError("init is from_checkpoint, so `backbone` must name a T5 v1.1 checkpoint.")
    return locate_backbone(BackboneConfig(path=config.backbone))


def _model(config: AdaptConfig, source: Path | None, vocabulary_size: int) -> T5V11:
    if source is not None:
        return read_t5(source, config.dropout)
    rows = -(-vocabulary_size // EMBEDDING_ROWS_MULTIPLE) * EMBEDDING_ROWS_MULTIPLE
    return new_t5(config.architecture, rows, config.dropout, config.seed)


def _tokenise(specs: list[str], tokenizer: Any) -> TokenisedCorpus:
    """Rank 0 fills the cache; the others find it there, or fill their own node's."""

    def work() -> TokenisedCorpus:
        return tokenise_corpus(specs, tokenizer, cache_directory() / "corpora")

    ranks.on_main(lambda: work() and None)
    return ranks.together(work)


def _train(
    run: AdaptationRun,
    store: CheckpointStore,
    stop: StopRequest,
    directory: RunDirectory,
    journal: Journal,
) -> bool:
    """All ranks: updates up to the last step; False if a stop was asked for before."""
    config = run.config
    while run.step < config.steps:
        started = time.monotonic()
        try:
            metrics = update_weights(run)
        except NonFiniteLossError as error:
            save(run, store)
            raise NonFiniteLossError(
                f"{error} The state after step {run.step} is saved."
            ) from error
        run.seconds += time.monotonic() - started
        if run.step % config.log_every_steps == 0 or run.step == config.steps:
            journal.log(run.step, metrics)
        if run.step % config.evaluation.every_steps == 0 or run.step == config.steps:
            _validate(run, journal)
        if run.step in config.export.steps:
            export(run, directory.path / f"export-step-{run.step:08d}")
        stopping = stop.agreed()
        if stopping or run.step % config.checkpoint.every_steps == 0 or run.step == config.steps:
            save(run, store)
        if stopping and run.step < config.steps:
            return False
    return True


def _validate(run: AdaptationRun, journal: Journal) -> None:
    loss = validation_loss(run)
    if loss is not None:
        journal.log(run.step, {"cross_entropy": loss}, kind="validation")


def _headline(run: AdaptationRun) -> str:
    config = run.config
    start = f"resuming after step {run.step}" if run.step else "starting"
    parameters = sum(p.numel() for p in run.model.parameters())
    return (
        f"{config.name}: {start}, {config.steps} steps of {config.batch.global_batch_size} "
        f"examples, {config.objective}, {parameters:,} weights, {len(run.train):,} examples an "
        f"epoch, {ranks.world_size()} rank(s)."
    )


def _nothing_to_resume(directory: RunDirectory) -> CheckpointError:
    return CheckpointError(
        f"{directory.checkpoints} holds no checkpoint. Check --run-dir, or start the run without "
        "--resume or --export."
    )
