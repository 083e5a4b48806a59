"""What cannot fit is refused before a weight is read."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from softprompt_dist.backbone import load
from softprompt_dist.backbone.cell import Cell, Workload
from softprompt_dist.backbone.scoring_memory import position_bytes
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel.node_memory import NodeMemory
from softprompt_dist.planning.models import find_architecture
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import room
from softprompt_dist.run.session import train

Memory = namedtuple("Memory", "total available")


class WeightsReadError(Exception):
    """The check let the run go on."""


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise WeightsReadError

    monkeypatch.setattr(load, "fill", fail)


def start(recipe: Path, folder: Path, *settings: str) -> None:
    train(load_recipe(TuneConfig, recipe, [f"run_directory={folder / 'run'}", *settings]))


@pytest.mark.usefixtures("no_weights")
def test_a_machine_that_is_too_small_is_refused_before_loading(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10**6, 10**6))
    with pytest.raises(
        MachineError, match=r"needs .* GB of memory for 1 rank.* on this machine.*softprompt plan"
    ):
        start(tiny_recipe, tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_so_is_a_job_whose_share_is_too_small(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    with pytest.raises(MachineError, match=r"on this job \(SLURM_MEM_PER_NODE\), which has 0.1 GB"):
        start(tiny_recipe, tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_dropout_counts(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where attention with dropout keeps its scores."""
    settings = ["batch.micro_batch_size=64", "batch.global_batch_size=64"]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(614_000_000, 614_000_000))
    with pytest.raises(WeightsReadError):
        start(tiny_recipe, tmp_path, *settings)
    with pytest.raises(MachineError, match=r"needs 0\.6 GB"):
        start(tiny_recipe, tmp_path, *settings, "backbone.dropout=0.1")


def test_scoring_follows_the_gpu_and_no_answer_depends_on_it(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in tells what the GPU has; the run notes what it came to."""
    backbone = load_recipe(TuneConfig, tiny_recipe).backbone
    work = Workload(1, 5, backbone.max_input_tokens)
    position = position_bytes(find_architecture(str(backbone.path)), Cell(), work)
    devices = {
        "cpu": None,
        "large": NodeMemory(80 * 10**9, 80 * 10**9),
        "shared": NodeMemory(3000 * position, 80 * 10**9),
    }
    found = {}
    for name, device in devices.items():
        monkeypatch.setattr(room, "device_memory", lambda device=device: device)
        start(tiny_recipe, tmp_path / name, "steps=2", "evaluation.batch_tokens=null")
        run = tmp_path / name / "run"
        (attempt,) = json.loads((run / "environment.json").read_text())["attempts"]
        found[name] = attempt["evaluation_batch_tokens"]
        answers = [p.read_bytes() for p in sorted(run.rglob("*predictions*.jsonl"))]
        assert answers == [
            p.read_bytes() for p in sorted((tmp_path / "cpu").rglob("*predictions*.jsonl"))
        ]
    assert found == {"cpu": 4096, "large": 65_536, "shared": 3000}
