"""One adaptation from recipe to exported folders, in a world that was joined already."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
from softprompt_dist.adaptation.curves import draw_curves
from softprompt_dist.adaptation.exporting import (
    check_ahead,
    check_free,
    check_targets,
    export_run,
    folder_of,
)
from softprompt_dist.adaptation.peak import Peak, find_peak
from softprompt_dist.adaptation.run import AdaptationRun, build_run, restore, save, start
from softprompt_dist.adaptation.stop_request import StopRequest
from softprompt_dist.adaptation.throughput import SHOWN_WHILE_TRAINING, Throughput
from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.data.lm.stream import BatchStream
from softprompt_dist.errors import BackboneError, CheckpointError, ConfigError, NonFiniteLossError
from softprompt_dist.parallel import ranks
from softprompt_dist.planning.work import training_operations
from softprompt_dist.recipe import to_yaml
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.journal import Journal

log = logging.getLogger(__name__)


def adapt(
    config: AdaptConfig,
    ds_config: dict[str, Any] | None = None,
    *,
    fresh: bool = False,
    must_resume: bool = False,
) -> bool:
    """All ranks: one run, from recipe to export, continuing where an earlier attempt stopped.

    Args:
        config: the checked recipe, with its run directory.
        ds_config: engine plumbing as it was read, or None for ours.
        fresh: set the directory's checkpoints aside first.
        must_resume: refuse to start at step 0.

    Returns:
        Whether all steps are done and nobody asked to stop.

    Raises:
        SoftpromptError: anything in the recipe, corpus, backbone or machine that cannot work.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    directory.create(tunes=False)
    store = _store(config, directory)
    if fresh:
        ranks.on_main(lambda: check_free(config, directory.path))  # before anything is set aside
        store.discard_all()
    found = store.newest()  # before any weight is read
    if found is None and must_resume:
        raise _nothing_to_resume(directory)
    if found is not None and found.step > config.steps:
        raise _steps_done(found.step, config)
    if found is None:
        ranks.on_main(lambda: check_free(config, directory.path))
    run = build_run(config, ds_config)
    if found is None:
        start(run)
    else:
        restore(run, found)
    check_ahead(run, directory.path)
    directory.record(to_yaml(config), describe_environment(), _data_record(run))
    with (
        Journal(
            directory, config.steps, start_step=run.step, shown=SHOWN_WHILE_TRAINING
        ) as journal,
        StopRequest() as stop,
        run.batches() as batches,
    ):
        return _Session(run, store, directory, journal, stop).train(batches)


def export_newest(config: AdaptConfig, ds_config: dict[str, Any] | None, folder: Path) -> None:
    """All ranks: write the newest checkpoint as Hugging Face folders, and train nothing.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError: `folder` exists and is not empty.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    found = _store(config, directory).newest()
    if found is None:
        raise _nothing_to_resume(directory)
    run = build_run(config, ds_config)
    restore(run, found)
    check_targets(run, folder, found.step)
    for written in export_run(run, folder, run.measure()):
        if ranks.is_main():
            print(f"Exported step {run.step} to {written}.", flush=True)


class _Session:
    """The loop, and what it leaves on the disk."""

    def __init__(
        self,
        run: AdaptationRun,
        store: AdaptationCheckpointStore,
        directory: RunDirectory,
        journal: Journal,
        stop: StopRequest,
    ) -> None:
        self.run, self.config = run, run.config
        self.store, self.directory = store, directory
        self.journal, self.stop = journal, stop
        self.measured: tuple[int, dict[str, float]] = (-1, {})
        """Step and values of the latest measurement."""

    def train(self, batches: BatchStream) -> bool:
        """All ranks: updates up to the last step (True), or until a stop is asked for."""
        run, config = self.run, self.config
        peak, operations = find_peak(_dtype(config)), _operations(run)
        throughput = None if operations is None else Throughput(operations, peak)
        self.journal.say(_headline(run, peak))
        if run.step == 0:
            self._measure()
        if run.step == config.steps:
            self.journal.say(f"All {config.steps} steps are done; nothing is trained.")
        if run.step in (*config.export.steps, config.steps):
            self._export()  # an earlier attempt may have ended between its checkpoint and this
        while run.step < config.steps:
            metrics = self._update(batches, throughput)
            self._log(metrics, throughput)
            if self._is_due(config.evaluation.every_steps):
                self._measure()
            stopping = self.stop.agreed()
            is_exported = run.step in (*config.export.steps, config.steps)
            if stopping or is_exported or self._is_due(config.checkpoint.every_steps):
                save(run, self.store)
            if is_exported:
                self._export()
            if stopping:
                self.journal.say(
                    f"Asked to stop; saved after step {run.step}. The same command continues."
                )
                return False
        return True

    def _is_due(self, every_steps: int) -> bool:
        """Whether what is done every so many steps, and at the last, is done now."""
        return self.run.step % every_steps == 0 or self.run.step == self.config.steps

    def _log(self, metrics: dict[str, float], throughput: Throughput | None) -> None:
        if self._is_due(self.config.log_every_steps):
            left = self.config.steps - self.run.step
            speed = throughput.read(left) if throughput else {}
            self.journal.log(self.run.step, metrics | speed)

    def _update(self, batches: BatchStream, throughput: Throughput | None) -> dict[str, float]:
        run, started = self.run, time.monotonic()
        step_batches = next(batches)
        try:
            metrics = run.update(step_batches)
        except NonFiniteLossError as error:
            save(run, self.store)
            raise NonFiniteLossError(
                f"{error} The state after step {run.step} is saved. A resume goes on with the same "
                "settings: with others, begin anew (--fresh, or another --run-dir)."
            ) from error
        seconds = time.monotonic() - started
        run.seconds += seconds
        if throughput:
            throughput.count(step_batches.num_real_tokens, step_batches.num_positions, seconds)
        return metrics

    def _measure(self) -> dict[str, float]:
        """All ranks: of the weights as they are; measured once a step."""
        if self.measured[0] != self.run.step:
            self.measured = (self.run.step, self.run.measure())
            if self.measured[1]:
                self.journal.log(self.run.step, self.measured[1], kind="validation")
        draw_curves(self.directory)
        return self.measured[1]

    def _export(self) -> None:
        folder = folder_of(self.directory.path, self.config, self.run.step)
        for written in export_run(self.run, folder, self._measure()):
            self.journal.say(f"Exported to {written}.")


def _store(config: AdaptConfig, directory: RunDirectory) -> AdaptationCheckpointStore:
    return AdaptationCheckpointStore(
        directory.checkpoints, config.checkpoint.keep_last, config.export.steps
    )


def _dtype(config: AdaptConfig) -> torch.dtype:
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def _operations(run: AdaptationRun) -> float | None:
    """Of one update on all ranks; None for a model that we have no numbers for."""
    hf_config = run.source.hf_config
    try:
        architecture = architecture_of(hf_config.model_type, hf_config.to_dict())
    except BackboneError:
        return None
    return training_operations(
        architecture,
        run.config.batch.global_batch_size,
        run.data.inputs_length or 0,
        run.data.targets_length,
    )


def _headline(run: AdaptationRun, peak: Peak) -> str:
    config = run.config
    begins = f"resuming after step {run.step}" if run.step else "starting"
    return (
        f"{config.name}: {begins}, {config.steps} steps of {config.batch.global_batch_size} "
        f"rows, {config.objective}, {run.engine.num_weights:,} weights, ZeRO stage "
        f"{config.engine.zero_stage}, {run.data.num_examples:,} examples an epoch, "
        f"{ranks.world_size()} rank(s). {peak.source}"
    )


def _data_record(run: AdaptationRun) -> dict[str, Any]:
    return {"corpus_fingerprint": run.corpus_fingerprint, "examples": run.data.num_examples}


def _steps_done(step: int, config: AdaptConfig) -> ConfigError:
    error = ConfigError(
        f"steps is {config.steps}, but {config.run_directory} has done {step} already. Raise "
        "steps, export what there is with --export FOLDER, or start over with --fresh."
    )
    error.on_all_ranks = True
    return error


def _nothing_to_resume(directory: RunDirectory) -> CheckpointError:
    error = CheckpointError(
        f"{directory.checkpoints} holds no checkpoint. Check --run-dir, or start the run without "
        "--resume or --export."
    )
    error.on_all_ranks = True
    return error
