"""What the checks of `softprompt slurm` find in a pipeline before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.checks.finding import ChecksFailedError
from softprompt_dist.slurm import main
from tests.pipelines import FakeSlurm, changed_stage, pipeline_values, write_pipeline


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "programs")
    monkeypatch.setenv("PATH", fake.path)
    return fake


Findings = Callable[..., dict[str, str]]


@pytest.fixture
def findings(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> Findings:
    """`findings(**changes)`: name of each check -> its status, what was found and the remedy."""

    def render(**changes: Any) -> dict[str, str]:
        path = write_pipeline(tmp_path, pipeline_values(tmp_path, **changes))
        with suppress(ChecksFailedError):
            main(["render", str(path)])
        return parsed(capsys.readouterr().out)

    return render


def parsed(table: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in table.splitlines():
        if line[:6].strip() in ("ok", "warn", "fail"):
            name = line[6:26].strip()
            found[name] = f"{line[:6].strip()}: {line[26:].strip()}"
        elif line.startswith(" " * 28):
            found[name] += f" {line.strip()}"
    return found


def test_every_stage_is_checked(findings: Findings) -> None:
    found = findings()
    assert {value.partition(":")[0] for value in found.values()} == {"ok"}
    assert found["adapt batch"].endswith("2 rank(s) x 6 rows, 12 rows a step")
    assert found["tune ranks"].endswith("1 node(s) x 2 rank(s) on 2 GPU(s)")
    assert found["tune sbatch"] == "ok: Job 1 to start at noon"
    assert "not checked: `gpu`" in found["adapt room and time"]


def test_what_slurm_would_not_take_fails_in_its_own_words(
    findings: Findings, slurm: FakeSlurm
) -> None:
    slurm.control(refuses_test=["tune"])
    found = findings()
    assert found["tune sbatch"].startswith("fail: Batch job submission failed: Requested node")
    assert "tune.sbatch" in found["tune sbatch"]
    assert found["adapt sbatch"].startswith("ok")
    assert slurm.submitted == []


def test_without_slurm_the_rest_is_checked_and_said_so(
    findings: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert findings()["sbatch"] == "ok: not checked: it is not on PATH here"


@pytest.mark.parametrize(
    ("where", "changes", "expected"),
    [
        ("tune", {"tasks": ["bolq"]}, ("tune tasks", "Did you mean 'boolq'?")),
        ("tune", {"recipe": "nowhere.yaml"}, ("tune recipe", "neither a file nor a packaged")),
        ("tune", {"recipe": "tiny-t5"}, ("tune recipe", "is a recipe of softprompt adapt")),
        ("adapt", {"recipe": "demo"}, ("adapt recipe", "is a recipe of softprompt train")),
        ("adapt", {"set": {"stepz": 3}}, ("adapt recipe", "Did you mean 'steps'?")),
        ("adapt", {"set": {"corpus": ["no.txt"]}}, ("adapt corpus", "missing: no.txt")),
        ("tune", {"set": {"prompt.length": 3}}, ("tune recipe", "boolq, seed 0: ")),
        ("evaluate", {"set": {"evaluation.methods": 1}}, ("evaluate recipe", "'method'")),
        (
            "adapt",
            {"deepspeed_config": "no.json"},
            ("adapt recipe", "Cannot read ds_config no.json"),
        ),
        ("evaluate", {"deepspeed_config": "no.json"}, ("evaluate ds_config", "Cannot read ds_c")),
        ("tune", {"sbatch": {"gpus-per-node": 3}}, ("tune batch", "must divide it")),
        ("adapt", {"sbatch": {"ntasks-per-node": 1}}, ("adapt ranks", "One rank runs on each GPU")),
        ("adapt", {"sbatch": {"time": "10"}}, ("adapt time", "told at once to save and end")),
        ("adapt", {"gpu": "a200"}, ("adapt room and time", "no numbers for a200")),
    ],
)
def test_what_would_end_a_job_is_found_before(
    where: str,
    changes: dict[str, Any],
    expected: tuple[str, str],
    findings: Findings,
    tmp_path: Path,
) -> None:
    check, said = expected
    found = findings(**{where: changed_stage(tmp_path, where, **changes)})
    assert found[check].startswith("fail"), found
    assert said in found[check]


def test_an_engine_that_deepspeed_does_not_take_is_found(
    findings: Findings, tmp_path: Path
) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}))
    changed = changed_stage(tmp_path, "adapt", deepspeed_config=str(path))
    found = findings(adapt=changed)
    assert "Did you mean 'overlap_comm'?" in found["adapt ds_config"]


def adapt_xxl(folder: Path, **sbatch: Any) -> dict[str, Any]:
    settings = {"backbone": "google/t5-v1_1-xxl", "corpus": [str(folder)]}
    return {"recipe": "paper-512-512", "set": settings, "sbatch": sbatch}


@pytest.mark.parametrize(
    ("gpus", "nodes", "expected"),
    [
        (8, 16, ("ok", "ok", "5.9 days")),
        (8, 2, ("ok", "warn", "47.1 days")),
        (1, 1, ("fail", "warn", "753.9 days")),
    ],
)
def test_memory_and_time_are_those_of_the_planner(
    gpus: int, nodes: int, expected: tuple[str, str, str], findings: Findings, tmp_path: Path
) -> None:
    sbatch = {"gpus-per-node": gpus, "nodes": nodes, "time": "7-00:00:00"}
    adapt = adapt_xxl(tmp_path, **sbatch)
    found = findings(gpu="a100-80", adapt=adapt, tune=None, evaluate=None)
    room, time, days = expected
    assert found["adapt room"].startswith(room)
    assert found["adapt time"].startswith(time)
    # The number that `softprompt plan --stage adapt` prints.
    assert "18,093 GPU-hours predicted at 35% of the peak" in found["adapt time"]
    assert days in found["adapt time"]
    if nodes == 2:
        assert "takes about 6 requeue(s)" in found["adapt time"]


def test_the_memory_of_a_sweep_is_that_of_what_is_adapted(
    findings: Findings, tmp_path: Path
) -> None:
    tune = {"recipe": "t5-xxl-superglue-boolq", "tasks": ["boolq"]}
    tune["set"] = {"backbone.sharding": "replicated"}
    found = findings(gpu="a10", adapt=adapt_xxl(tmp_path), tune=tune)
    assert found["tune room"].startswith("fail: 31.")
    assert "softprompt plan" in found["tune room"]
