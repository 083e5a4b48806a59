"""One rank of the tuning benchmark: our run, or the peer's, on the rows of the same recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import StepClock
from benchmarks.flops import frozen_step_flops
from benchmarks.memory import PeakMemory


def our_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our tuning loop, with its journal, checkpoint and final validation."""
    clock = StepClock()
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from softprompt_dist.config import TuneConfig
    from softprompt_dist.parallel import ranks
    from softprompt_dist.run.directory import RunDirectory
    from softprompt_dist.run.journal import Journal
    from softprompt_dist.run.tuning import build_tuning_run

    losses: list[float] = []

    class TimedJournal(Journal):
        def log(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
            super().log(step, metrics, kind)
            if kind == "train":
                losses.append(float(metrics["cross_entropy"]))
                clock.end_step()

    config = TuneConfig.model_validate(settings["recipe"])
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as name:
        run = build_tuning_run(config)
        clock.watch_forward(run.backbone)

        def count_flops(_: torch.nn.Module, given: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():  # an update's; scoring has passes of its own
                clock.add("flops", _flops_of_batch(run.backbone.config, *given))

        run.backbone.register_forward_pre_hook(count_flops)
        run.optimizer.step = clock.timed("optimizer", run.optimizer.step)  # type: ignore[method-assign]
        _tune(run, RunDirectory(ranks.broadcast_object(name)), TimedJournal, clock)
        torch.distributed.barrier()  # rank 0's folder goes last
    answer = _answer(clock, peak, losses, settings)
    leave_world()
    return answer


def _tune(run: Any, directory: Any, journal_kind: Any, clock: StepClock) -> None:
    from softprompt_dist.lifecycle.attempt import Attempt
    from softprompt_dist.lifecycle.vitals import Vitals
    from softprompt_dist.run.loop import Records, tune
    from softprompt_dist.run.saved_state import restore

    directory.create()
    with (
        Attempt(directory.path, run.config.health, {}) as attempt,
        journal_kind(directory, run.config.steps) as journal,
    ):
        state = restore(run, None)
        state.validated_step = 0  # the clock is for updates
        vitals = Vitals(attempt, journal.say)
        clock.start()
        tune(run, state, Records(directory, journal, attempt, vitals))


def peft_trainer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's prompt tuning in the Hugging Face Trainer under DeepSpeed ZeRO-3."""
    clock = StepClock()
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from benchmarks.peft_trainer import build_trainer
    from softprompt_dist.config import TuneConfig

    config = TuneConfig.model_validate(settings["recipe"])
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as name:
        trainer = build_trainer(
            config, clock, Path(name), scaled_window=settings["scale_live_window"]
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    answer = _answer(clock, peak, losses, settings)
    leave_world()
    return answer


def _flops_of_batch(model_config: Any, prompt_BPD: torch.Tensor, batch: Any) -> float:
    num_inputs = prompt_BPD.shape[1] + batch.input_ids_BS.shape[1]
    num_targets = batch.target_ids_BT.shape[1]
    return frozen_step_flops(model_config, len(prompt_BPD), num_inputs, num_targets)


def _answer(
    clock: StepClock, peak: PeakMemory, losses: list[float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    batch = settings["recipe"]["batch"]
    return {
        "steps": clock.steps[settings["warm_up_steps"] :],
        "losses": losses,
        "global_batch_size": batch["global_batch_size"],
        "peak_rss_bytes": peak.resident_bytes,
        "peak_anonymous_bytes": peak.anonymous_bytes,
    }
