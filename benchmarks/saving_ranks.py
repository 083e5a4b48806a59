"""One rank of the saving benchmark: updates with a save among them, or a prompt's saves alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def adaptation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds over all ways to save; each saves once and makes the same number of updates."""
    os.environ["SOFTPROMPT_CACHE"] = settings["cache"]
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from softprompt_dist.adapt_config import AdaptConfig
    from softprompt_dist.adaptation.run import build_run, start, state_of
    from softprompt_dist.adaptation.saving import HostCopy
    from softprompt_dist.adaptation.sharded_files import num_bytes_of

    run = build_run(AdaptConfig.model_validate(settings["recipe"]), None)
    start(run)
    folder = _emptied(settings["checkpoints"])
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in settings["variants"]}
    with run.batches() as batches:
        for _ in range(2):  # what is done for the first time
            run.update(next(batches))
        began = time.perf_counter()
        HostCopy().of(state_of(run))
        first_copy_seconds = time.perf_counter() - began
        savers = {name: _saver(folder / name, name == "background") for name in rounds}
        _period(run, batches, savers["background"], 1)  # the copy's memory is made once
        for _ in range(settings["rounds"]):
            for name, periods in rounds.items():
                saver = None if name == "none" else savers[name]
                periods.append(_period(run, batches, saver, settings["steps"]))
    for saver in savers.values():
        saver.__exit__(None, None, None)
    num_bytes = num_bytes_of(state_of(run).tensors)
    answer = {
        "rounds": rounds,
        "steps": settings["steps"],
        "num_weights": run.engine.num_weights,
        "bytes": num_bytes,
        "first_copy_seconds": first_copy_seconds,
    }
    leave_world()
    shutil.rmtree(folder, ignore_errors=True)
    return answer


def prompt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Saves of a prompt with AdamW's state, as tuning makes them, by an attempt at a run."""
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    import torch

    from softprompt_dist.lifecycle.attempt import Attempt
    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.equality import assert_equal_on_all_ranks
    from softprompt_dist.run.checkpoint import CheckpointStore
    from softprompt_dist.section import HealthConfig

    torch.manual_seed(1)
    folder, seconds = _emptied(settings["folder"]), []
    names = ("prompt", "best_prompt", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq")
    tensors = {name: torch.randn(*settings["shape"]) for name in names}
    with Attempt(folder, HealthConfig(), {}) as attempt:
        store = CheckpointStore(folder / "checkpoints", 3, attempt)
        for step in range(1, settings["saves"] + 1):
            ranks.gather_objects(None)  # together, as they are at a step's end
            began = time.perf_counter()
            digest = assert_equal_on_all_ranks(tensors["prompt"], "The prompt")
            store.save(step, tensors, {"step": step, "prompt_sha256": digest})
            seconds.append(time.perf_counter() - began)
    leave_world()
    shutil.rmtree(folder, ignore_errors=True)
    return {"seconds": seconds, "bytes": sum(t.numel() * 4 for t in tensors.values())}


def _saver(folder: Path, in_background: bool) -> Any:
    from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
    from softprompt_dist.adaptation.saving import CheckpointSaver

    store = AdaptationCheckpointStore(folder, keep_last=1)
    return CheckpointSaver(
        store, in_background=in_background, say=lambda text: None, limit_seconds=3600.0
    )


def _period(run: Any, batches: Any, saver: Any, steps: int) -> dict[str, float]:
    """A save, if there is a saver, then updates, then what is left of the save."""
    from softprompt_dist.adaptation.run import state_of
    from softprompt_dist.parallel import ranks

    ranks.gather_objects(None)
    computed, began = time.process_time(), time.perf_counter()
    if saver is not None:
        saver.save(state_of(run))
    saved = time.perf_counter()
    watch = None if saver is None else _Watch(saver, began)
    for _ in range(steps):
        run.update(next(batches))
        if watch is not None:
            watch.look()
    updated = time.perf_counter()
    if watch is not None:
        saver.wait()
        watch.look()
    ended = time.perf_counter()
    return {
        "blocked": saved - began,
        "updates": updated - saved,
        "seconds": ended - began,
        "cpu": time.process_time() - computed,
        "published": watch.seconds if watch is not None else 0.0,
    }


class _Watch:
    """When a save was seen to be over: at the end of an update, as a run would see it."""

    def __init__(self, saver: Any, began: float) -> None:
        self._saver, self._began = saver, began
        self.seconds = 0.0
        self.look()

    def look(self) -> None:
        """Whether it is over now."""
        if not self.seconds and not self._saver.is_writing:
            self.seconds = time.perf_counter() - self._began


def _emptied(name: str) -> Path:
    """All ranks: a folder without anything in it."""
    from softprompt_dist.parallel import ranks

    folder = Path(name)
    ranks.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    ranks.on_main(lambda: folder.mkdir(parents=True))
    return folder
