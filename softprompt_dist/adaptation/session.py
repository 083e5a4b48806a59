"""One adaptation from recipe to exported folders, in a world that was joined already."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore, FoundCheckpoint
from softprompt_dist.adaptation.exporting import (
    check_ahead,
    check_free,
    check_targets,
    export_run,
)
from softprompt_dist.adaptation.loop import AdaptationLoop, Records
from softprompt_dist.adaptation.run import AdaptationRun, build_run, restore, start, state_of
from softprompt_dist.adaptation.saving import CheckpointSaver
from softprompt_dist.adaptation.sharded_files import num_bytes_of
from softprompt_dist.adaptation.throughput import SHOWN_WHILE_TRAINING
from softprompt_dist.errors import CheckpointError, ConfigError
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.lifecycle.preflight import preflight
from softprompt_dist.lifecycle.vitals import Vitals
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.parallel.groups import cpu_group_problem
from softprompt_dist.recipe import to_yaml
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.metrics_file import loss_history

log = logging.getLogger(__name__)


def adapt(
    config: AdaptConfig,
    ds_config: dict[str, Any] | None = None,
    *,
    fresh: bool = False,
    must_resume: bool = False,
    force: bool = False,
) -> None:
    """All ranks: one run, from recipe to export, continuing where an earlier attempt stopped.

    Args:
        config: the checked recipe, with its run directory.
        ds_config: engine plumbing as it was read, or None for ours.
        fresh: set the directory's checkpoints aside first.
        must_resume: refuse to start at step 0.
        force: go on though the model to start from is another one than before.

    Raises:
        StoppedError: on all ranks, when somebody asked to stop and the state is saved.
        SoftpromptError: anything in the recipe, corpus, backbone or machine that cannot work.
    """
    facts = {"verb": "adapt", "name": config.name, "steps": config.steps}
    with Attempt(Path(str(config.run_directory)), config.health, facts) as attempt:
        if attempt.begins_anew(fresh):
            set_aside([config], attempt)
        adapt_stage(config, ds_config, attempt, must_resume=must_resume, force=force)
        attempt.finish(config.steps)


def adapt_stage(
    config: AdaptConfig,
    ds_config: dict[str, Any] | None,
    attempt: Attempt,
    *,
    must_resume: bool = False,
    force: bool = False,
) -> None:
    """All ranks: as `adapt`, as a part of an attempt that may have others.

    Args:
        config: as there.
        ds_config: as there.
        attempt: its `steps_before` are those of the stages before.
        must_resume: as there.
        force: as there.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    directory.create(tunes=False)
    with doing("loading", config.health.slow_timeout_seconds):
        in_background = config.checkpoint.background and _can_save_beside()
        found = _find_checkpoint(config, directory, attempt, must_resume)  # before any weight
        run = _load(config, ds_config, found, force=force)
        _look_ahead(run, directory)
    attempt.reopen()  # only now: a recipe that does not belong here leaves all as it was
    directory.record(to_yaml(config), describe_environment(), _data_record(run))
    with Journal(
        directory, config.steps, start_step=run.step, shown=SHOWN_WHILE_TRAINING
    ) as journal:
        saver = CheckpointSaver(
            _store(config, directory, attempt),
            in_background=in_background,
            say=journal.say,
            limit_seconds=config.health.slow_timeout_seconds,
        )
        window = config.health.spike_window
        losses, spikes = ranks.on_main(lambda: loss_history(directory.metrics, window))
        vitals = Vitals(attempt, journal.say, losses, spikes)
        with saver, run.batches() as batches:
            records = Records(directory, journal, attempt, vitals, saver)
            loop = AdaptationLoop(run, records)
            with doing("between two steps", config.health.step_timeout_seconds):
                loop.train(batches)


def set_aside(stages: Sequence[AdaptConfig], attempt: Attempt) -> None:
    """All ranks: rename all checkpoints of the stages, so that the first begins at step 0.

    Raises:
        ConfigError: on all ranks; an export of one is in the way, and nothing was renamed.
        CheckpointError: on all ranks; they may not be renamed.
    """
    directories = [RunDirectory(Path(str(config.run_directory))) for config in stages]

    def check() -> None:
        for config, directory in zip(stages, directories, strict=True):
            check_free(config, directory.path)

    ranks.on_main(check)
    for config, directory in zip(stages, directories, strict=True):
        _store(config, directory, attempt).discard_all()
    # Only now: a step on record without its checkpoint is refused, and that is the safe side.
    before = ranks.on_main(lambda: min(attempt.files.published_step(), attempt.steps_before))
    attempt.begun_anew()
    if before:  # of the stages that stay
        ranks.on_main(lambda: attempt.files.publish_step(before))


def export_newest(
    config: AdaptConfig, ds_config: dict[str, Any] | None, folder: Path, *, force: bool = False
) -> None:
    """All ranks: write the newest checkpoint as Hugging Face folders, and train nothing.

    `force`: as in `adapt`.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError: `folder` exists and is not empty.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    found = _store(config, directory).newest()
    if found is None:
        raise _nothing_to_resume(directory)
    run = build_run(config, ds_config, force=force)
    restore(run, found, force=force)
    check_targets(run, folder, found.step)
    for written in export_run(run, folder, run.measure()):
        if ranks.is_main():
            print(f"Exported step {run.step} to {written}.", flush=True)


def _load(
    config: AdaptConfig,
    ds_config: dict[str, Any] | None,
    found: FoundCheckpoint | None,
    *,
    force: bool,
) -> AdaptationRun:
    """All ranks: the run with its weights, as it begins or goes on from a checkpoint."""
    run = build_run(config, ds_config, force=force)
    stop.end_here_if_asked("making the engine")
    if found is None:
        start(run)
    else:
        restore(run, found, force=force)
    stop.end_here_if_asked("reading the weights")
    return run


def _can_save_beside() -> bool:
    """All ranks: whether they can talk while NCCL does; before any weight is read."""
    problem = cpu_group_problem()
    if problem and ranks.is_main():
        log.warning(
            "Training will wait for each checkpoint: to write it in the background the ranks must "
            "talk over gloo, and cannot (%s). Name an interface that all hosts reach with "
            "GLOO_SOCKET_IFNAME, or set checkpoint.background=false.",
            problem,
        )
    return not problem


def _find_checkpoint(
    config: AdaptConfig, directory: RunDirectory, attempt: Attempt, must_resume: bool
) -> FoundCheckpoint | None:
    found = _store(config, directory, attempt).newest()
    if found is None and must_resume:
        raise _nothing_to_resume(directory)
    if found is not None and found.step > config.steps:
        raise _steps_done(found.step, config)
    if found is None:
        ranks.on_main(lambda: check_free(config, directory.path))
    step = found.step if found else 0
    ranks.on_main(lambda: _check_resumed(attempt, step, config.steps))
    stop.end_here_if_asked("reading the checkpoint")
    return found


def _check_resumed(attempt: Attempt, step: int, steps: int) -> None:
    """Whether a stage is as far as it once was; of a later one the published step says so itself.

    Raises:
        CheckpointError: there were checkpoints of it, and none is left.
    """
    reached = min(attempt.files.published_step() - attempt.steps_before, steps)
    if reached > step:
        attempt.files.check_resumed(attempt.steps_before + step if step else 0)


def _look_ahead(run: AdaptationRun, directory: RunDirectory) -> None:
    """All ranks: refuse now what would end the run at its first save or export."""
    check_ahead(run, directory.path)
    is_done = run.step == run.config.steps
    needed = 0 if is_done else num_bytes_of(state_of(run).tensors)
    say = partial(print, flush=True)
    preflight(directory.path, needed, say, shared_for="so that a resume can read its checkpoints")


def _store(
    config: AdaptConfig, directory: RunDirectory, attempt: Attempt | None = None
) -> AdaptationCheckpointStore:
    keep = config.checkpoint.keep_last
    return AdaptationCheckpointStore(directory.checkpoints, keep, config.export.steps, attempt)


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
