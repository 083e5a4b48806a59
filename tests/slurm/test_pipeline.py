"""A pipeline on a real Slurm, with a stand-in trainer: to the end, past a failure, and again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.checks.finding import ChecksFailedError
from softprompt_dist.slurm import main
from tests.pipelines import pipeline_values, write_pipeline
from tests.slurm.cluster import wait_until
from tests.slurm.lab import Lab

Submit = Callable[..., str]
# A little of everything, so that it runs beside the jobs of other tests.
SMALL = {"nodes": 1, "gpus-per-node": 1, "cpus-per-task": 1, "mem": "10", "time": "60"}
AWKWARD = "a b;'c' \"d\" $(touch pwned) `touch pwned`, *\ne"


@pytest.fixture
def submit(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Submit:
    """`submit(recipe)`: `softprompt slurm pipeline`, as a user of the cluster."""
    for name, value in (lab.environ() | {"SLURM_CONF": str(lab.cluster.conf)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def run(recipe: Path) -> str:
        main(["pipeline", str(recipe)])
        return capsys.readouterr().out

    return run


def small_pipeline(folder: Path) -> Path:
    values = pipeline_values(folder, sbatch=SMALL)
    values["tune"] |= {"seeds": [0], "set": {"prompt.initialisation": "text"}}
    values["tune"]["set"]["prompt.text"] = AWKWARD
    values["adapt"]["sbatch"] = {"signal": "B:USR1@60"}
    return write_pipeline(folder, values)


def jobs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "pipeline" / "pipeline.json").read_text())[
        "jobs"
    ]
    return found


def states(lab: Lab, job: str) -> set[str]:
    """Of a job, or of all elements of an array."""
    out = lab.cluster.call(
        "squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", "--format=%T"
    )
    return set(out.split())


def over(lab: Lab, job: str, *wanted: str) -> None:
    wait_until(
        lambda: states(lab, job) <= set(wanted),
        60,
        f"job {job} is {states(lab, job)}, not {wanted}",
    )


def attempt(folder: Path) -> dict[str, Any]:
    """What the stand-in was given, the only time that it was started."""
    (path,) = folder.glob("attempt-*-rank-0.json")
    noted: dict[str, Any] = json.loads(path.read_text())
    return noted


@pytest.mark.drill("D30")
def test_a_pipeline_runs_to_its_end_and_is_not_run_again(
    submit: Submit, lab: Lab, tmp_path: Path
) -> None:
    recipe, runs = small_pipeline(tmp_path), tmp_path / "pipeline"
    submit(recipe)
    ids = [job["id"] for job in jobs(tmp_path)]
    assert "There is nothing to submit" in submit(recipe), "all wait or run"
    assert [job["id"] for job in jobs(tmp_path)] == ids
    over(lab, ids[2], "COMPLETED")
    assert states(lab, ids[0]) == states(lab, ids[1]) == {"COMPLETED"}
    done = sorted(str(path.parent.relative_to(runs)) for path in runs.rglob("DONE"))
    elements = ("tune/boolq-seed0", "tune/cb-seed0")
    assert done == [
        "adapt",
        *(f"{each}{more}" for each in elements for more in ("", "/evaluation")),
    ]
    tuned = attempt(runs / "tune" / "cb-seed0")["argv"]
    assert tuned[-2:] == ["--set", f"prompt.text={json.dumps(AWKWARD)}"]
    assert f"backbone.path={runs / 'adapt' / 'export'}" in tuned
    chosen = tuned.index("seed=0") - 3
    assert tuned[chosen : chosen + 3] == ["--set", "task.catalogue=cb", "--set"]
    assert "validation" in attempt(runs / "tune" / "cb-seed0" / "evaluation")["argv"]
    assert list(tmp_path.rglob("pwned")) == []

    (runs / "adapt" / "export").mkdir()  # the stand-in makes none
    (runs / "tune" / "cb-seed0" / "evaluation" / "DONE").unlink()
    said = submit(recipe)
    assert "evaluate boolq, seed 0: done" in said
    (again,) = jobs(tmp_path)[3:]
    assert list(again["directories"]) == ["1"]
    over(lab, again["id"], "COMPLETED")
    assert "There is nothing to submit" in submit(recipe)


@pytest.mark.drill("D30")
def test_a_stage_that_fails_stops_the_rest_until_it_is_put_right(
    submit: Submit, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs = small_pipeline(tmp_path), tmp_path / "pipeline"
    monkeypatch.setenv("SOFTPROMPT_MAX_ATTEMPTS", "0")  # so that the script gives up at once
    submit(recipe)
    adapt, tune, evaluate = (job["id"] for job in jobs(tmp_path))
    over(lab, evaluate, "CANCELLED")
    assert states(lab, adapt) == {"FAILED"}
    assert states(lab, tune) == {"CANCELLED"}
    assert not (runs / "tune").exists()
    with pytest.raises(ChecksFailedError, match="adapt stopped"):
        submit(recipe)
    assert len(jobs(tmp_path)) == 3

    (runs / "adapt" / "STOP").unlink()
    monkeypatch.delenv("SOFTPROMPT_MAX_ATTEMPTS")
    submit(recipe)
    over(lab, jobs(tmp_path)[-1]["id"], "COMPLETED")
    assert len(list(runs.rglob("DONE"))) == 5
