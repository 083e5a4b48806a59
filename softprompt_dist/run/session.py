"""One tuning run from recipe to report, in a world that was joined already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from softprompt_dist.backbone.fingerprint import assert_unchanged
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import CheckpointError
from softprompt_dist.parallel import ranks
from softprompt_dist.recipe import to_yaml
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.loop import checkpoint_store, publish_prompt, restore, tune, validate
from softprompt_dist.run.outcome import record_untuned, report_outcome
from softprompt_dist.run.tuning import TuningRun, build_tuning_run


def train(
    config: TuneConfig,
    ds_config: dict[str, Any] | None = None,
    *,
    fresh: bool = False,
    must_resume: bool = False,
) -> None:
    """All ranks: one run, from recipe to report, continuing where an earlier attempt stopped.

    Args:
        config: the checked recipe.
        ds_config: engine plumbing, or None for ours.
        fresh: set the directory's checkpoints aside first.
        must_resume: refuse to run without a checkpoint.
    """
    directory = RunDirectory(Path(str(config.run_directory)))
    directory.create()
    store = checkpoint_store(config, directory)
    if fresh:
        store.discard_all()
    checkpoint = store.load_newest()  # before any weight is read
    if must_resume and checkpoint is None:
        ranks.together(lambda: _refuse_to_start(directory))
    run = build_tuning_run(config, ds_config)
    state = restore(run, checkpoint)
    if state.best_score is not None:
        # An attempt that was killed may have published a prompt of steps that are now redone.
        ranks.on_main(lambda: publish_prompt(run, state, directory))
    # Only once the checkpoint has been found to belong to this recipe.
    directory.record(to_yaml(config), describe_environment(), _data_records(run))
    with Journal(directory, config.steps, start_step=state.step) as journal:
        journal.say(_headline(run, state.step))
        if state.step == 0:
            record_untuned(run, directory)
            validate(run, state, directory, journal)
        tune(run, state, directory, journal)
        assert_unchanged(run.backbone, run.backbone_checksum)
        report_outcome(run, state, directory, journal)


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
        "prompt": f"{config.prompt.prompt_length} x {run.backbone.d_model}",
        "examples": {
            task.name: {name: len(split.texts) for name, split in task.splits.items()}
            for task in run.tasks
        },
    }
    return f"{config.name}: {start}, {config.steps} steps. " + json.dumps(facts)
