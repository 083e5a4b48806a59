"""The batch scripts as they are: what their heads say, and what they refuse. Needs no Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from softprompt_dist.recipe import recipe_names
from tests.slurm.lab import REPOSITORY, SCRIPTS

BATCH = ["adapt_xxl.sh", "evaluate_xxl.sh", "sweep.sh", "train_xxl.sh"]
ALLOCATION = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """Variables of a job, on a machine without Slurm."""
    for name in ("srun", "scontrol", "squeue"):
        (tmp_path / name).write_text(f"#!/bin/bash\necho {name} was called >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    folders = {"RUN_DIR": str(tmp_path / "run"), "SWEEP_DIR": str(tmp_path)}
    surroundings = {"PATH": path, "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    return surroundings | ALLOCATION | folders


def run(script: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPTS / script]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", BATCH)
def test_the_head_asks_for_what_a_requeue_needs(script: str) -> None:
    lines = (SCRIPTS / script).read_text().splitlines()
    head = {line.split()[1].partition("=")[0]: line for line in lines if line.startswith("#SBATCH")}
    assert {"--requeue", "--open-mode", "--output"} <= head.keys()
    assert "=append" in head["--open-mode"]
    assert "=B:USR1@" in head["--signal"]
    # One task per GPU, each of which may reach the others' GPUs.
    words = {name: head[name].split()[1] for name in ("--ntasks-per-node", "--gpus-per-node")}
    assert len({word.partition("=")[2] for word in words.values()}) == 1
    assert "--gpus-per-task" not in head
    to_edit = ("--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal")
    assert [name for name in to_edit if "# EDIT" not in head[name]] == []


@pytest.mark.parametrize("script", BATCH)
def test_what_a_script_names_exists(script: str) -> None:
    text = (SCRIPTS / script).read_text()
    recipes = [name for name in recipe_names() if f"RECIPE:-{name}}}" in text]
    assert recipes or script == "evaluate_xxl.sh"
    engine = text.partition("DS_CONFIG:-")[2].partition("}")[0]
    assert (REPOSITORY / engine).is_file()


@pytest.mark.parametrize("script", BATCH)
@pytest.mark.parametrize("missing", ["SLURM_SUBMIT_DIR", "SLURM_JOB_ID"])
def test_outside_a_job_nothing_is_started(
    outside: dict[str, str], script: str, missing: str
) -> None:
    del outside[missing]
    done = run(script, outside)
    assert done.returncode != 0
    assert f"{missing}: not inside a Slurm job: submit with sbatch" in done.stderr
    assert "was called" not in done.stderr


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("evaluate_xxl.sh", {}, "PROMPT: no prompt: submit with PROMPT=FILE"),
        ("sweep.sh", {"SEEDS": "0"}, 'TASKS: no tasks: submit with TASKS="boolq cb"'),
        ("sweep.sh", {"TASKS": "cb"}, 'SEEDS: no seeds: submit with SEEDS="0 1 2"'),
        ("sweep.sh", {"TASKS": "cb rte", "SEEDS": "0 1"}, "submit with sbatch --array=0-3"),
        (
            "sweep.sh",
            {"TASKS": "cb rte", "SEEDS": "0 1", "SLURM_ARRAY_TASK_ID": "4"},
            "No element 4: 2 tasks with 2 seeds are --array=0-3",
        ),
        (
            "sweep.sh",
            {"TASKS": "cb", "SEEDS": "0", "SLURM_ARRAY_TASK_ID": "0", "SWEEP_VERB": "adapt"},
            "SWEEP_VERB=adapt must be train or evaluate",
        ),
    ],
)
def test_what_is_missing_is_named(
    outside: dict[str, str], script: str, variables: dict[str, str], message: str
) -> None:
    done = run(script, outside | variables)
    assert done.returncode != 0
    assert message in done.stderr
    assert "was called" not in done.stderr


@pytest.mark.parametrize(
    ("file", "code", "words"), [("DONE", 0, "complete at step 30"), ("STOP", 93, "30")]
)
def test_a_run_that_is_over_is_not_started(
    outside: dict[str, str], file: str, code: int, words: str
) -> None:
    folder = Path(outside["RUN_DIR"])
    folder.mkdir()
    (folder / file).write_text("30\n")
    done = run("train_xxl.sh", outside)
    assert (done.returncode, done.stderr) == (code, "")
    assert words in done.stdout
    assert "Next: " in done.stdout.splitlines()[-1]


def test_a_run_outside_of_slurm_is_left_alone(outside: dict[str, str]) -> None:
    folder = Path(outside["RUN_DIR"])
    folder.mkdir()
    for name, text in {"attempt.json": '{\n "job": ""\n}', "heartbeat.json": "{}"}.items():
        (folder / name).write_text(text)
    done = run("train_xxl.sh", outside)
    assert (done.returncode, done.stderr) == (93, "")
    assert f"a run that is no Slurm job is alive in {folder}" in done.stdout
    assert {path.name for path in folder.iterdir()} == {"attempt.json", "heartbeat.json"}

    os.utime(folder / "heartbeat.json", (0, 0))  # it is dead
    assert "scontrol was called" in run("train_xxl.sh", outside).stderr


def test_a_disk_that_goes_away_does_not_keep_a_job_from_being_queued_again(
    tmp_path: Path, outside: dict[str, str]
) -> None:
    """It is asked to be; here no Slurm grants it."""
    (tmp_path / "srun").write_text('#!/bin/bash\nrm -rf -- "$RUN_DIR"\nexit 1\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho n1\n[[ $1 == show ]]\n")
    environ = outside | {"BASH_FUNC_sleep%%": "() { :; }"}  # no time passes
    done = run("train_xxl.sh", environ)
    assert f"{tmp_path / 'run'}/no_progress cannot be written; it should say: 1 0 0" in done.stdout
    assert "this job cannot be queued again" in done.stdout
    assert done.returncode == 75
