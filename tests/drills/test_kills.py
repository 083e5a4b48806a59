"""Drills with real processes that really die."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.session import train
from tests import runs
from tests.distributed import launch

TRAIN = "softprompt_dist.train"
KILLED_IN_SAVE = Path(__file__).with_name("killed_in_save.py")


def published(run_dir: Path) -> list[int]:
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def assert_same_end(run_dir: Path, reference: Path, step: int) -> None:
    for name in ("state.safetensors", "rng.safetensors"):
        ours, theirs = (runs.checkpoint_folder(d, step) / name for d in (run_dir, reference))
        assert ours.read_bytes() == theirs.read_bytes(), name
    best = "prompt/best.safetensors"
    assert (run_dir / best).read_bytes() == (reference / best).read_bytes()
    assert runs.metrics_without_time(run_dir) == runs.metrics_without_time(reference)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have: sums of several threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.drill("D2")
@pytest.mark.usefixtures("one_thread", "lone_process")
@pytest.mark.parametrize("place", ["tensors", "rename"])
def test_killed_in_a_save(
    tiny_recipe: Path,
    tmp_path: Path,
    place: str,
    drilled: Callable[..., None],
) -> None:
    settings = ["steps=8", "checkpoint.every_steps=2", "evaluation.every_steps=4"]
    settings.append("backbone.dropout=0.1")
    overrides = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, str(KILLED_IN_SAVE), place, "3", "--recipe", str(tiny_recipe)]
    run_dir = tmp_path / "run"
    command += ["--run-dir", str(run_dir), *overrides]
    with launch.RunningRanks(command, 1, tmp_path / "logs") as ranks:
        (killed,) = ranks.wait(timeout=90, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert published(run_dir) == [2, 4]
    assert [path.name[:9] for path in (run_dir / "checkpoints").glob(".tmp-*")] == [".tmp-step"]
    assert (run_dir / "why").read_text() == "running\n"

    started = time.perf_counter()
    for folder in (run_dir, tmp_path / "whole"):
        train(load_recipe(TuneConfig, tiny_recipe, [*settings, f"run_directory={folder}"]))
    drilled(steps_redone=2, seconds=time.perf_counter() - started)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    assert_same_end(run_dir, tmp_path / "whole", 8)


@pytest.mark.drill("D1", "D17", "D20")
@pytest.mark.slow
def test_a_storm_of_kills(
    tiny_recipe: Path, zero3_json: Path, tmp_path: Path, drilled: Callable[..., None]
) -> None:
    """Twenty kills of rank 0, 1 or both, at any moment, and sometimes while it starts."""
    chosen = random.Random(20)
    common = ["--recipe", tiny_recipe, "--deepspeed_config", zero3_json]
    for setting in ("steps=200", "checkpoint.every_steps=5", "evaluation.every_steps=50"):
        common += ["--set", setting]
    common += ["--set", "backbone.dropout=0.1"]
    run_dir = tmp_path / "run"
    redone, seconds, before = [0], [], 0
    for attempt in range(20):
        arguments = [*common, "--run-dir", run_dir]
        started = time.perf_counter()
        with launch.start_module_on_ranks(TRAIN, arguments, 2, tmp_path / f"{attempt}") as ranks:
            reached = before + chosen.randint(1, 8)
            while last_step(run_dir) < reached and all(p.poll() is None for p in ranks.processes):
                time.sleep(0.02)
            seconds.append(time.perf_counter() - started)
            time.sleep(chosen.uniform(0, 0.1))
            if all(p.poll() is not None for p in ranks.processes):
                break  # it came to its end first
            killed = chosen.choice([(0,), (1,), (0, 1)])
            for rank in killed:
                ranks.kill(rank)
            for rank in {0, 1} - set(killed):
                ranks.kill(rank, signal.SIGTERM)  # as launchers do once a rank has ended
            ranks.wait(timeout=90, check=False)
        now = max(published(run_dir), default=0)
        assert now >= before, "a published checkpoint was lost"
        redone.append(last_step(run_dir) - now)
        before = now
    launch.run_module_on_ranks(TRAIN, [*common, "--run-dir", run_dir], 2, tmp_path / "last")
    whole = tmp_path / "whole"
    launch.run_module_on_ranks(TRAIN, [*common, "--run-dir", whole], 2, tmp_path / "whole-logs")
    drilled(steps_redone=max(redone), seconds=max(seconds))
    assert max(redone) <= 4
    assert_same_end(run_dir, whole, 200)


def last_step(run_dir: Path) -> int:
    lines = runs.metrics_without_time(run_dir, "train") if run_dir.exists() else []
    return int(lines[-1]["step"]) if lines else 0


def carry_on(recipe: str, folder: str, plan: list[list[Any]]) -> list[str]:
    """On ranks: each (run, overrides) of a plan in turn; the digest of each prompt."""
    digests = []
    for name, overrides in plan:
        settings = [f"run_directory={folder}/{name}", *overrides]
        config = load_recipe(TuneConfig, recipe, settings)
        ds_config = runs.PARTITION_EVERYTHING if config.backbone.sharding == "zero3" else None
        train(config, ds_config)
        last = max(Path(folder, name, "checkpoints").glob("step-*"))
        digests.append((last / "state.safetensors").read_bytes().hex())
    return digests


@pytest.fixture
def moved(tiny_recipe: Path, tmp_path: Path, lone_process: None) -> tuple[Path, list[str]]:
    """Runs of one, two and one rank again, and one held otherwise by two."""
    common = ["evaluation.every_steps=4", "checkpoint.every_steps=4", "steps=12"]
    train(load_recipe(TuneConfig, tiny_recipe, [*common, f"run_directory={tmp_path / 'whole'}"]))
    first = [*common, "steps=4", f"run_directory={tmp_path / 'moves'}"]
    train(load_recipe(TuneConfig, tiny_recipe, first))
    for name in ("zero3", "replicated"):
        shutil.copytree(tmp_path / "moves", tmp_path / name)
    plan = [
        ("moves", [*common, "steps=8"]),
        ("zero3", [*common, "steps=4", "backbone.sharding=zero3"]),
        ("replicated", [*common, "steps=4"]),
        ("zero3", [*common, "steps=8", "backbone.sharding=zero3"]),
    ]
    digests = launch.run_function_on_ranks(
        f"{Path(__file__).stem}:carry_on",
        2,
        tmp_path / "logs",
        recipe=tiny_recipe,
        folder=tmp_path,
        plan=plan,
        env={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(launch.REPOSITORY)])},
    )
    last = [*common, f"run_directory={tmp_path / 'moves'}"]
    train(load_recipe(TuneConfig, tiny_recipe, last))
    return tmp_path, digests[0]


@pytest.mark.drill("D18", "D19")
def test_a_run_moves_between_ranks_and_shardings(
    moved: tuple[Path, list[str]], drilled: Callable[..., None]
) -> None:
    folder, digests = moved
    losses = {
        name: [line["loss"] for line in runs.metrics_without_time(folder / name, "train")]
        for name in ("whole", "moves", "zero3")
    }
    assert losses["moves"] == pytest.approx(losses["whole"], abs=1e-6)
    assert losses["zero3"] == pytest.approx(losses["whole"][:8], abs=1e-6)
    assert digests[1] == digests[2], "what was loaded is the same prompt, to the bit"
    drilled(steps_redone=0)
