"""The tuning loop: update, log, validate, save; and the state that a resume needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import softprompt_dist
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.batching import tokenizer_fingerprint
from softprompt_dist.errors import CheckpointError, NonFiniteLossError
from softprompt_dist.metrics.registry import find_metrics
from softprompt_dist.metrics.scores import Scores
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.equality import assert_equal_on_all_ranks
from softprompt_dist.prompt.file import PromptMetadata, joined, save_prompt
from softprompt_dist.run.checkpoint import Checkpoint, CheckpointStore
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.loaded_task import LoadedTask
from softprompt_dist.run.optimizer import (
    learning_rate_at,
    optimizer_from_tensors,
    optimizer_to_tensors,
)
from softprompt_dist.run.step import accumulate_gradient
from softprompt_dist.run.tuning import TuningRun

log = logging.getLogger(__name__)

_OPTIMIZER_PREFIX = "optimizer."
_FREE_TO_CHANGE: dict[str, Any] = {
    "name": ...,
    "run_directory": ...,
    "steps": ...,
    "deepspeed_config": ...,
    "checkpoint": ...,
    "backbone": {
        "path",
        "revision",
        "sharding",
        "shard_group",
        "offload",
        "offload_path",
        "activation_checkpointing",
    },
    "batch": {"micro_batch_size", "micro_batch_tokens"},
    "evaluation": {"batch_tokens", "early_stopping_patience"},
    "transfer": ...,
}
"""Settings that a resume may change: no result depends on them (dropout's draws aside), or the
fingerprint decides."""


@dataclass
class TuningState:
    """What changes during a run, besides the prompt and its optimizer."""

    best_prompt_PD: Tensor
    step: int = 0
    examples_consumed: int = 0
    best_score: float | None = None
    """In percent; None before the first validation."""
    best_step: int = 0
    validations_without_gain: int = 0
    """How many in a row were no better than the best before them."""


def tune(run: TuningRun, state: TuningState, directory: RunDirectory, journal: Journal) -> None:
    """All ranks: continue from `state` to the recipe's last step."""
    config = run.config
    store = checkpoint_store(config, directory)
    while state.step < config.steps and not _has_stalled(run, state):
        metrics = _update(run, state, store)
        journal.log(state.step, metrics)
        if state.step % config.evaluation.every_steps == 0 or state.step == config.steps:
            validate(run, state, directory, journal)
        ends = state.step == config.steps or _has_stalled(run, state)
        if state.step % config.checkpoint.every_steps == 0 or ends:
            save(run, state, store)
    if state.step < config.steps:
        journal.say(
            f"Stopped after step {state.step}: {state.validations_without_gain} validations in a "
            f"row were no better than {state.best_score:.1f} before them "
            "(evaluation.early_stopping_patience)."
        )


def validate(run: TuningRun, state: TuningState, directory: RunDirectory, journal: Journal) -> None:
    """All ranks: score the prompt on the validation splits and keep it if it is the best so far.

    The score is the mean over the tasks of each task's own.
    """
    found: list[Scores] = []
    for task in run.tasks:
        split = task.splits["validation"].sample(run.config.evaluation.max_validation_examples)
        predictions = run.predict(run.prompt, task, split)
        # One rank's sums: on another kind of processor they may differ in the last bit, and all
        # must agree on what is best.
        found.append(ranks.on_main(partial(task.judge, predictions, split.texts)))
    values = score_values(run.tasks, found)
    score = values[score_name(run.tasks)]
    journal.log(state.step, values, "validation")
    best = state.best_score
    gained = best is None or score > best
    state.validations_without_gain = 0 if gained else state.validations_without_gain + 1
    if best is None or score >= best:  # of equals the later: it has seen more
        state.best_score, state.best_step = score, state.step
        state.best_prompt_PD = run.prompt.weight.detach().clone()
        ranks.on_main(lambda: publish_prompt(run, state, directory))


def publish_prompt(run: TuningRun, state: TuningState, directory: RunDirectory) -> None:
    """Write the best prompt so far as the run's result (rank 0 only; no collective inside)."""
    prompt_PD = state.best_prompt_PD.cpu()
    assert state.best_score is not None
    metadata = PromptMetadata(
        backbone_fingerprint=run.backbone.fingerprint,
        backbone=run.backbone.path,
        tokenizer_fingerprint=tokenizer_fingerprint(run.tokenizer),
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
    save_prompt(directory.prompts / "best.safetensors", prompt_PD, metadata)


def checkpoint_store(config: TuneConfig, directory: RunDirectory) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(directory.checkpoints, config.checkpoint.keep_last)


def save(run: TuningRun, state: TuningState, store: CheckpointStore) -> None:
    """All ranks: publish prompt, optimizer and cursor, once the prompts are found equal."""
    digest = assert_equal_on_all_ranks(run.prompt.weight, "The prompt")
    tensors = {
        "prompt": run.prompt.weight.detach().cpu(),
        "best_prompt": state.best_prompt_PD.cpu(),
        **{
            _OPTIMIZER_PREFIX + name: tensor.cpu()
            for name, tensor in optimizer_to_tensors(run.optimizer).items()
        },
    }
    values = {
        "seed": run.config.seed,
        "step": state.step,
        "examples_consumed": state.examples_consumed,
        "best_score": state.best_score,
        "best_step": state.best_step,
        "validations_without_gain": state.validations_without_gain,
        "prompt_sha256": digest,
        "backbone_fingerprint": run.backbone.fingerprint,
        "data_digests": _digests(run),
        "recipe": _binding_recipe(run.config),
    }
    store.save(state.step, tensors, values)


def restore(run: TuningRun, checkpoint: Checkpoint | None) -> TuningState:
    """All ranks: the state that the run continues from, which is `checkpoint`'s if there is one.

    Raises:
        CheckpointError: it belongs to another recipe, backbone or data. A run never begins again
            from step 0 in silence.
    """
    if checkpoint is None:
        return TuningState(best_prompt_PD=run.prompt.weight.detach().clone())
    values, tensors = checkpoint.state, checkpoint.tensors
    ranks.together(lambda: _check_belongs(run, checkpoint))
    with torch.no_grad():
        run.prompt.weight.copy_(tensors["prompt"])
    optimizer_from_tensors(
        run.optimizer,
        {
            name.removeprefix(_OPTIMIZER_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_OPTIMIZER_PREFIX)
        },
    )
    checkpoint.restore_rng()
    assert_equal_on_all_ranks(run.prompt.weight, "The prompt of the checkpoint")
    return TuningState(
        best_prompt_PD=tensors["best_prompt"].to(run.prompt.weight.device),
        **{
            name: values[name]
            for name in (
                "step",
                "examples_consumed",
                "best_score",
                "best_step",
                "validations_without_gain",
            )
        },
    )


def _update(run: TuningRun, state: TuningState, store: CheckpointStore) -> dict[str, float]:
    learning_rate = learning_rate_at(run.config.optimizer, state.step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    batches = run.batches(state.examples_consumed)
    gathered_before = run.backbone.traffic.gathered_bytes
    try:
        # Raised by all ranks or by none: the sums that decide were all-reduced.
        metrics = accumulate_gradient(run.backbone, run.prompt, batches, run.config.z_loss)
    except NonFiniteLossError as error:
        save(run, state, store)
        raise NonFiniteLossError(
            f"Step {state.step + 1}: {error} The state after step {state.step} is saved."
        ) from error
    run.optimizer.step()
    state.step += 1
    state.examples_consumed += run.config.batch.global_batch_size
    gathered = run.backbone.traffic.gathered_bytes - gathered_before
    return {**metrics, "learning_rate": learning_rate, "gathered_bytes": gathered}


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


def _digests(run: TuningRun) -> dict[str, dict[str, str]]:
    return {task.name: dict(task.data.digests) for task in run.tasks}


def _binding_recipe(config: TuneConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_FREE_TO_CHANGE)


def _check_belongs(run: TuningRun, checkpoint: Checkpoint) -> None:
    values = checkpoint.state
    now = {
        "backbone fingerprint": run.backbone.fingerprint,
        "data": _digests(run),
        **_flat(_binding_recipe(run.config)),
    }
    then = {
        "backbone fingerprint": values.get("backbone_fingerprint"),
        "data": values.get("data_digests"),
        **_flat(values.get("recipe", {})),
    }
    different = [key for key in now if now[key] != then.get(key)]
    if different:
        lines = "\n".join(
            f"  - {key}: saved {then.get(key)!r}, now {now[key]!r}" for key in different
        )
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} belongs to another run:\n{lines}\n"
            "Use the saved values, another --run-dir, or --fresh to set the old run aside."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
