"""One rank of the adaptation benchmark: our run, the peer's, or our rows without any model."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.clock import CpuTime, StepClock
from benchmarks.memory import PeakMemory


def our_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our updates, with the rows made beside them as in every run."""
    clock = StepClock()
    run = _build(settings)
    from softprompt_dist.adaptation.run import start
    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import leave_world
    from softprompt_dist.planning.work import training_operations

    losses = []
    with PeakMemory() as peak:
        start(run)
        rows = run.config.batch.global_batch_size
        flops = training_operations(
            _architecture(run.source.hf_config),
            rows,
            run.data.inputs_length or 0,
            run.data.targets_length,
        )
        with run.batches() as batches:
            cpu = CpuTime()
            clock.start()
            for _ in range(run.config.steps):
                step = next(batches)
                losses.append(run.update(step)["cross_entropy"])
                # Of all ranks, and added over them later.
                clock.add("real_tokens", step.num_real_tokens / ranks.world_size())
                clock.add("positions", step.num_positions / ranks.world_size())
                clock.add("flops", flops / ranks.world_size())
                clock.add("cpu", cpu.since_last_call())
                clock.end_step()
    answer = _answer(clock, peak, losses, settings)
    leave_world()
    return answer


def hf_trainer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The Hugging Face Trainer under DeepSpeed with its Adafactor, on the same examples.

    `real_tokens`, `positions` and `flops` are this rank's; a step takes as many examples as ours
    of the same text.
    """
    clock = StepClock()
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from benchmarks.hf_adaptation import build_trainer
    from softprompt_dist.adapt_config import AdaptConfig

    config = AdaptConfig.model_validate(settings["recipe"])
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as name:
        trainer = build_trainer(config, settings, clock, Path(name))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    answer = _answer(clock, peak, losses, settings)
    leave_world()
    return answer


def pipeline(settings: Mapping[str, Any]) -> dict[str, float]:
    """Real tokens per second of the rows of whole global batches, on one core, of each recipe."""
    from softprompt_dist.adapt_config import AdaptConfig
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    speeds = {
        name: _tokens_per_second(
            AdaptConfig.model_validate(recipe), Path(settings["cache"]), settings["seconds"]
        )
        for name, recipe in settings["recipes"].items()
    }
    leave_world()
    return speeds


def _tokens_per_second(config: Any, cache: Path, seconds: float) -> float:
    """Real ones, of rows that nothing reads."""
    from benchmarks.hf_adaptation import open_data
    from softprompt_dist.data.lm.stream import BatchStream

    data, _ = open_data(config, cache)
    with BatchStream(data, config.batch, 0, rank=0, world_size=1) as batches:
        next(batches)
        tokens, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds or not tokens:
            tokens += next(batches).num_real_tokens
    return tokens / passed


def _build(settings: Mapping[str, Any]) -> Any:
    os.environ["SOFTPROMPT_CACHE"] = settings["cache"]
    from softprompt_dist.parallel.join import join_world

    join_world()
    from softprompt_dist.adapt_config import AdaptConfig
    from softprompt_dist.adaptation.run import build_run

    return build_run(AdaptConfig.model_validate(settings["recipe"]), None)


def _architecture(hf_config: Any) -> Any:
    from softprompt_dist.backbone.architecture import architecture_of

    return architecture_of(hf_config.model_type, hf_config.to_dict())


def _answer(
    clock: StepClock, peak: PeakMemory, losses: list[float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "steps": clock.steps[settings["warm_up_steps"] :],
        "losses": losses,
        "peak_rss_bytes": peak.resident_bytes,
    }
