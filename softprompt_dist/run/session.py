"""One tuning run from recipe to report, in a world that was joined already."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from softprompt_dist.backbone.fingerprint import assert_unchanged
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import CheckpointError
from softprompt_dist.identity import Identity
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.lifecycle.preflight import preflight
from softprompt_dist.lifecycle.vitals import Vitals
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.prompt.file import load_prompt
from softprompt_dist.recipe import to_yaml
from softprompt_dist.run.checkpoint import Checkpoint
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.loop import Records, publish_prompt, tune
from softprompt_dist.run.metrics_file import loss_history
from softprompt_dist.run.outcome import record_untuned, report_outcome
from softprompt_dist.run.saved_state import TuningState, check_backbone, checkpoint_store, restore
from softprompt_dist.run.tuning import TuningRun, build_tuning_run

_WIDEST_BACKBONE = 8192
"""d_model, for as long as the backbone's own is not known."""
_OTHER_BYTES = 16 * 2**20
"""For metrics, events, predictions, plots and reports."""


def train(
    config: TuneConfig,
    ds_config: dict[str, Any] | None = None,
    *,
    fresh: bool = False,
    must_resume: bool = False,
    force: bool = False,
) -> None:
    """All ranks: one run, from recipe to report, continuing where an earlier attempt stopped.

    Args:
        config: the checked recipe.
        ds_config: engine plumbing, or None for ours.
        fresh: set the directory's checkpoints aside first.
        must_resume: refuse to run without a checkpoint.
        force: go on, or begin with a prompt file, though the backbone is another one.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    directory.create()
    facts = {"verb": "train", "name": config.name, "steps": config.steps}
    with Attempt(directory.path, config.health, facts) as attempt:
        preflight(directory.path, _bytes_to_write(config), partial(print, flush=True))
        with doing("loading", config.health.slow_timeout_seconds):
            checkpoint = _find_checkpoint(config, directory, attempt, fresh, must_resume)
            run = build_tuning_run(
                config, ds_config, lambda here: _accept(here, config, checkpoint, force=force)
            )
            state = restore(run, checkpoint)
        attempt.reopen()  # only now: a recipe that does not belong here leaves all as it was
        # Only once the checkpoint has been found to belong to this recipe.
        used = {"evaluation_batch_tokens": run.scorer.batch_tokens}
        environment = describe_environment() | used
        directory.record(to_yaml(config), environment, _data_records(run))
        with Journal(directory, config.steps, start_step=state.step) as journal:
            window = config.health.spike_window
            losses, spikes = ranks.on_main(lambda: loss_history(directory.metrics, window))
            vitals = Vitals(attempt, journal.say, losses, spikes)
            _tune(run, state, Records(directory, journal, attempt, vitals))


def _accept(
    here: Identity, config: TuneConfig, checkpoint: Checkpoint | None, *, force: bool
) -> None:
    """That the run may go on, or begin with the prompt of a file, on this backbone."""
    if checkpoint is not None:
        check_backbone(checkpoint, here, force=force)
    elif config.prompt.initialisation == "file":
        load_prompt(str(config.prompt.file), backbone=here, force=force)


def _tune(run: TuningRun, state: TuningState, records: Records) -> None:
    """All ranks: from the state to the report."""
    attempt, health = records.attempt, run.config.health
    if state.best_score is not None:
        # An attempt that was killed may have published a prompt of steps that are now redone.
        ranks.on_main(lambda: publish_prompt(run, state, records))
    records.journal.say(_headline(run, state.step))
    attempt.note(step=state.step)
    if state.step == 0:
        with doing("scoring the untuned prompt", health.slow_timeout_seconds):
            record_untuned(run, records.directory)
    with doing("between two steps", health.step_timeout_seconds):
        tune(run, state, records)
    with doing("scoring the result", health.slow_timeout_seconds):
        assert_unchanged(run.backbone, run.backbone_checksum)
        report_outcome(run, state, records)
    attempt.finish(state.step)


def _bytes_to_write(config: TuneConfig) -> int:
    prompt = 4 * config.prompt.prompt_length * _WIDEST_BACKBONE
    # The prompt, the best one, and at most two states of the optimizer.
    return (config.checkpoint.keep_last + 1) * 4 * prompt + _OTHER_BYTES


def _find_checkpoint(
    config: TuneConfig, directory: RunDirectory, attempt: Attempt, fresh: bool, must_resume: bool
) -> Checkpoint | None:
    """All ranks: what the run continues from, before any weight is read."""
    store = checkpoint_store(config, directory, attempt)
    if attempt.begins_anew(fresh):
        store.discard_all()
        attempt.begun_anew()
    checkpoint = store.load_newest()
    if must_resume and checkpoint is None:
        ranks.together(lambda: _refuse_to_start(directory))
    step = checkpoint.step if checkpoint else 0
    ranks.on_main(lambda: attempt.files.check_resumed(step))
    stop.end_here_if_asked("reading the checkpoint")
    return checkpoint


def _refuse_to_start(directory: RunDirectory) -> None:
    raise CheckpointError(
        f"--resume was given, but {directory.checkpoints} holds no checkpoint. Check --run-dir, or "
        "leave --resume out to start at step 0."
    )


def _data_records(run: TuningRun) -> dict[str, Any]:
    """Where each split of each task comes from, and its digest."""
    records: dict[str, Any] = {}
    for task in (*run.tasks, *run.transfers):
        splits = {split: task.data.provenance(split) for split in task.data.records}
        records.setdefault(task.name, {}).update(splits)
    return records


def _headline(run: TuningRun, step: int) -> str:
    config = run.config
    start = f"resuming after step {step}" if step else "starting"
    facts = {
        "backbone": config.backbone.path,
        "sharding": config.backbone.sharding,
        "dtype": config.backbone.dtype,
        "ranks": ranks.world_size(),
        "device": ranks.device_name(),
        "prompt": f"{config.prompt.prompt_length} x {run.backbone.d_model}",
        "examples": {
            task.name: {name: len(split.texts) for name, split in task.splits.items()}
            for task in run.tasks
        },
        "positions scored at a time": run.scorer.batch_tokens,
    }
    return f"{config.name}: {start}, {config.steps} steps. " + json.dumps(facts)
