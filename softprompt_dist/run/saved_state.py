"""What changes while a prompt is tuned, and what of it a resume needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import CheckpointError
from softprompt_dist.identity import Identity, check_same_backbone
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.equality import assert_equal_on_all_ranks
from softprompt_dist.run.checkpoint import Checkpoint, CheckpointStore
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.optimizer import optimizer_from_tensors, optimizer_to_tensors
from softprompt_dist.run.tuning import TuningRun

_OPTIMIZER_PREFIX = "optimizer."
_BEST_PROMPT = "best_prompt"
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
    "health": ...,
}
"""Settings that a resume may change: no result depends on them (dropout's draws aside), or the
backbone's identity decides."""


_COUNTERS = (
    "step",
    "examples_consumed",
    "best_step",
    "validations_without_gain",
    "validated_step",
)


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
    validated_step: int = -1
    """Of the last validation that came to its end."""


def checkpoint_store(
    config: TuneConfig, directory: RunDirectory, attempt: Attempt
) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(directory.checkpoints, config.checkpoint.keep_last, attempt)


def save(run: TuningRun, state: TuningState, store: CheckpointStore) -> None:
    """All ranks: publish prompt, optimizer and cursor, once the prompts are found equal."""
    with doing(f"saving step {state.step}", run.config.health.slow_timeout_seconds):
        _save(run, state, store)


def _save(run: TuningRun, state: TuningState, store: CheckpointStore) -> None:
    digest = assert_equal_on_all_ranks(run.prompt.weight, "The prompt")
    tensors = {
        "prompt": run.prompt.weight.detach().cpu(),
        _BEST_PROMPT: state.best_prompt_PD.cpu(),
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
        "validated_step": state.validated_step,
        "prompt_sha256": digest,
        "identity": dataclasses.asdict(run.identity),
        "data_digests": _digests(run),
        "recipe": _binding_recipe(run.config),
    }
    # A validation that an earlier attempt was stopped in has been made up for since.
    store.save(state.step, tensors, values, may_differ={_BEST_PROMPT})


def restore(run: TuningRun, checkpoint: Checkpoint | None) -> TuningState:
    """All ranks: the state that the run continues from, which is `checkpoint`'s if there is one.

    Raises:
        CheckpointError: it belongs to another recipe or data. A run never begins again
            from step 0 in silence.
    """
    if checkpoint is None:
        return TuningState(best_prompt_PD=run.prompt.weight.detach().clone())
    values, tensors = checkpoint.state, checkpoint.tensors
    values.setdefault("validated_step", checkpoint.step)  # earlier versions did not save it
    ranks.together(lambda: _check_belongs(run, checkpoint))
    ranks.together(lambda: _check_forms(run, checkpoint))
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
    ranks.together(lambda: _restore_rng(checkpoint))
    assert_equal_on_all_ranks(run.prompt.weight, "The prompt of the checkpoint")
    if checkpoint.step == 0:  # of a run whose first loss was not finite: all is to be done again
        return TuningState(best_prompt_PD=run.prompt.weight.detach().clone())
    return TuningState(
        best_prompt_PD=tensors[_BEST_PROMPT].to(run.prompt.weight.device),
        best_score=values["best_score"],
        **{name: values[name] for name in _COUNTERS},
    )


def _digests(run: TuningRun) -> dict[str, dict[str, str]]:
    return {task.name: dict(task.data.digests) for task in run.tasks}


def _binding_recipe(config: TuneConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_FREE_TO_CHANGE)


def _check_belongs(run: TuningRun, checkpoint: Checkpoint) -> None:
    values = checkpoint.state
    now = {
        "data": _digests(run),
        **_flat(_binding_recipe(run.config)),
    }
    then = {
        "data": values.get("data_digests"),
        **_flat(recipe if isinstance(recipe := values.get("recipe"), dict) else {}),
    }
    for key, value in _as_release_0_1(run).items():
        then.setdefault(key, now[key] if value is None else value)
    different = [key for key in now if now[key] != then.get(key)]
    if different:
        lines = "\n".join(
            f"  - {key}: saved {then.get(key)!r:.300}, now {now[key]!r}" for key in different
        )
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} belongs to another run:\n{lines}\n"
            "Use the saved values, another --run-dir, or --fresh to set the old run aside."
        )


def _as_release_0_1(run: TuningRun) -> dict[str, Any]:
    """How settings that it did not have must be set to read rows as it did; None: in any way."""
    settings: dict[str, Any] = {"backbone.prepend_bos": False if run.reader.input_start else None}
    for index, task in enumerate(run.tasks):
        texts = [example.target_text for example in task.splits["train"].texts]
        is_changed = list(run.reader.spelt(task.config, texts)) != texts
        place = f"mixture.tasks.{index - 1}" if index else "task"
        settings[f"{place}.target_separator"] = "" if is_changed else None
    return settings


def check_backbone(checkpoint: Checkpoint, here: Identity, *, force: bool) -> None:
    """Refuse to continue a checkpoint with another backbone.

    Raises:
        CheckpointError: it was saved with another one, and not `force`.
    """
    values = checkpoint.state
    # Release 0.1.0 saved of it the digest of the weights alone.
    of_weights = {"path": "", "weights": values.get("backbone_fingerprint", "")}
    try:
        there = Identity.from_json(values.get("identity", of_weights))
    except ValueError as error:
        raise _not_of_train(checkpoint, str(error)) from error
    belongs = f"The checkpoint of step {checkpoint.step} was saved with"
    check_same_backbone(there, here, belongs, error=CheckpointError, force=force)


def _check_forms(run: TuningRun, checkpoint: Checkpoint) -> None:
    """What can be wrong though every checksum is right: somebody else made the checkpoint."""
    wrong = [
        name
        for name in ("prompt", _BEST_PROMPT)
        if (found := checkpoint.tensors.get(name)) is None
        or (found.shape, found.dtype) != (run.prompt.weight.shape, torch.float32)
    ]
    wrong += [n for n in _COUNTERS if type(checkpoint.state.get(n)) is not int]
    if not isinstance(checkpoint.state.get("best_score"), int | float | None):
        wrong.append("best_score")
    if wrong:
        raise _not_of_train(checkpoint, ", ".join(wrong))


def _restore_rng(checkpoint: Checkpoint) -> None:
    try:
        checkpoint.restore_rng()
    except (RuntimeError, TypeError, ValueError) as error:
        raise _not_of_train(checkpoint, "the random states") from error


def _not_of_train(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint of step {checkpoint.step} is whole, but `softprompt train` did not write "
        f"it: {what} cannot be used. Resume another one, or pass --fresh to set it aside."
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            flat[prefix + key] = len(value)
            value = {str(index): one for index, one in enumerate(value)}
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
