"""What cannot fit is refused before a weight is read."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from softprompt_dist.backbone import load
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import MachineError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.session import train

Memory = namedtuple("Memory", "total available")


class WeightsReadError(Exception):
    """The check let the run go on."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise WeightsReadError

    monkeypatch.setattr(load, "fill", fail)


def start(recipe: Path, folder: Path, *settings: str) -> None:
    train(load_recipe(TuneConfig, recipe, [f"run_directory={folder / 'run'}", *settings]))


def test_a_machine_that_is_too_small_is_refused_before_loading(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10**6, 10**6))
    with pytest.raises(
        MachineError, match=r"needs .* GB of memory for 1 rank.* on this machine.*softprompt plan"
    ):
        start(tiny_recipe, tmp_path)


def test_so_is_a_job_whose_share_is_too_small(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    with pytest.raises(MachineError, match=r"on this job \(SLURM_MEM_PER_NODE\), which has 0.1 GB"):
        start(tiny_recipe, tmp_path)


def test_dropout_counts(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where attention with dropout keeps its scores."""
    settings = ["batch.micro_batch_size=64", "batch.global_batch_size=64"]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(614_000_000, 614_000_000))
    with pytest.raises(WeightsReadError):
        start(tiny_recipe, tmp_path, *settings)
    with pytest.raises(MachineError, match=r"needs 0\.6 GB"):
        start(tiny_recipe, tmp_path, *settings, "backbone.dropout=0.1")
