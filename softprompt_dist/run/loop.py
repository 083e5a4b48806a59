"""The tuning loop: update, log, validate, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import softprompt_dist
from softprompt_dist.errors import NonFiniteLossError, StoppedError
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.lifecycle.vitals import Vitals
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.metrics.registry import find_metrics
from softprompt_dist.metrics.scores import Scores
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.file import PromptMetadata, joined, save_prompt
from softprompt_dist.run.checkpoint import CheckpointStore
from softprompt_dist.run.checkpoint_folder import outcome_of_saving
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.loaded_task import LoadedTask
from softprompt_dist.run.optimizer import learning_rate_at
from softprompt_dist.run.saved_state import TuningState, checkpoint_store, save
from softprompt_dist.run.step import accumulate_gradient
from softprompt_dist.run.tuning import TuningRun


@dataclass(frozen=True)
class Records:
    """Where a run's attempt leaves what it does."""

    directory: RunDirectory
    journal: Journal
    attempt: Attempt
    vitals: Vitals


def tune(run: TuningRun, state: TuningState, records: Records) -> None:
    """All ranks: continue from `state` to the recipe's last step.

    Raises:
        StoppedError: on all ranks, when somebody asked to stop and the state is saved.
    """
    config, journal, attempt = run.config, records.journal, records.attempt
    store = checkpoint_store(config, records.directory, attempt)
    # An earlier attempt may have been stopped in it. If this one is, too, it stays to be done.
    why = _validate_if_due(run, state, records)
    if why:
        raise attempt.stopped(why, state.step)
    while state.step < config.steps and not _has_stalled(run, state):
        with doing(f"step {state.step + 1}", records.vitals.step_limit_seconds):
            metrics = _update(run, state, store, records.vitals)
        why = attempt.stop_wanted()  # first: who was superseded writes nothing more
        journal.log(state.step, metrics)
        why = why or _validate_if_due(run, state, records)
        ends = state.step == config.steps or _has_stalled(run, state)
        if why or ends or state.step % config.checkpoint.every_steps == 0:
            save(run, state, store)
        if why:
            raise attempt.stopped(why, state.step)
    if state.step < config.steps:
        journal.say(
            f"Stopped after step {state.step}: {state.validations_without_gain} validations in a "
            f"row were no better than {state.best_score:.1f} before them "
            "(evaluation.early_stopping_patience)."
        )


def _validate_if_due(run: TuningRun, state: TuningState, records: Records) -> str:
    """All ranks: why the run must end, if somebody asked for it meanwhile; else empty."""
    steps, every_steps = run.config.steps, run.config.evaluation.every_steps
    is_due = state.step % every_steps == 0 or state.step == steps
    if not is_due or state.validated_step == state.step:
        return ""
    try:
        with doing(f"validating step {state.step}", run.config.health.step_timeout_seconds):
            validate(run, state, records)
    except StoppedError:
        return records.attempt.stop_wanted()
    return ""


def validate(run: TuningRun, state: TuningState, records: Records) -> None:
    """All ranks: score the prompt on the validation splits and keep it if it is the best so far.

    The score is the mean over the tasks of each task's own.
    """
    found: list[Scores] = []
    for task in run.tasks:
        split = task.splits["validation"].sample(run.config.evaluation.max_validation_examples)
        what = f"validating step {state.step}, {task.name}"
        predictions = run.predict(run.prompt, task, split, what)
        # One rank's sums: on another kind of processor they may differ in the last bit, and all
        # must agree on what is best.
        found.append(ranks.on_main(partial(task.judge, predictions, split.texts)))
    values = score_values(run.tasks, found)
    score = values[score_name(run.tasks)]
    with doing("looking whose the run directory is", run.config.health.slow_timeout_seconds):
        ranks.on_main(records.attempt.check_ours)  # it took long
    records.journal.log(state.step, values, "validation")
    best = state.best_score
    gained = best is None or score > best
    state.validations_without_gain = 0 if gained else state.validations_without_gain + 1
    if best is None or score >= best:  # of equals the later: it has seen more
        state.best_score, state.best_step = score, state.step
        state.best_prompt_PD = run.prompt.weight.detach().clone()
        with doing("publishing the best prompt", run.config.health.slow_timeout_seconds):
            ranks.on_main(lambda: publish_prompt(run, state, records))
    state.validated_step = state.step


def publish_prompt(run: TuningRun, state: TuningState, records: Records) -> None:
    """Write the best prompt so far as the run's result (rank 0 only; no collective inside)."""
    records.attempt.check_ours()
    prompt_PD = state.best_prompt_PD.cpu()
    assert state.best_score is not None
    metadata = PromptMetadata(
        identity=run.identity,
        task="+".join(task.name for task in run.tasks),
        task_family=joined(task.data.family for task in run.tasks),
        target_prefix=joined(task.config.target_prefix or "" for task in run.tasks),
        initialisation=run.config.prompt.initialisation,
        step=state.best_step,
        metric=score_name(run.tasks),
        score=state.best_score,
        prompt_length=prompt_PD.shape[0],
        d_model=prompt_PD.shape[1],
        version=softprompt_dist.__version__,
    )
    save_prompt(records.directory.prompts / "best.safetensors", prompt_PD, metadata)


def _update(
    run: TuningRun, state: TuningState, store: CheckpointStore, vitals: Vitals
) -> dict[str, float]:
    vitals.begin_step()
    learning_rate = learning_rate_at(run.config.optimizer, state.step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    batches = run.batches(state.examples_consumed)
    gathered_before = run.backbone.traffic.gathered_bytes
    try:
        # Raised by all ranks or by none: the sums that decide were all-reduced.
        metrics = accumulate_gradient(
            run.backbone, run.prompt, batches, run.config.z_loss, arrive=vitals.arrive
        )
    except NonFiniteLossError as error:
        saved = outcome_of_saving(state.step, lambda: save(run, state, store))
        raise NonFiniteLossError(f"Step {state.step + 1}: {error} {saved}") from error
    run.optimizer.step()
    state.step += 1
    state.examples_consumed += run.config.batch.global_batch_size
    gathered = run.backbone.traffic.gathered_bytes - gathered_before
    metrics |= {"learning_rate": learning_rate, "gathered_bytes": gathered}
    return metrics | vitals.end_step(state.step, metrics)


def score_name(tasks: Sequence[LoadedTask]) -> str:
    """What a validation score is called: its metric, or `score` where it is a mean of several."""
    values = [value for m in find_metrics(tasks[0].data.metrics) for value in m.gives]
    return values[0] if len(tasks) == 1 and len(values) == 1 else "score"


def score_values(tasks: Sequence[LoadedTask], found: Sequence[Scores]) -> dict[str, float]:
    """What metrics.jsonl has of the tasks' scores: the values of each, and the mean over tasks."""
    values = {
        (f"{task.name}/" if len(tasks) > 1 else "") + name: value
        for task, scores in zip(tasks, found, strict=True)
        for name, value in scores.values.items()
    }
    return values | {score_name(tasks): sum(scores.score for scores in found) / len(found)}


def _has_stalled(run: TuningRun, state: TuningState) -> bool:
    patience = run.config.evaluation.early_stopping_patience
    return patience is not None and state.validations_without_gain >= patience
