"""The batch script under a fake srun that shows what it was given; no cluster needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from softprompt_dist.recipe import recipe_names

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "train_xxl.sh"
ALLOCATION = {
    "SLURM_SUBMIT_DIR": str(REPOSITORY),
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_PER_TASK": "6",
}


@pytest.fixture
def fake_slurm(tmp_path: Path) -> dict[str, str]:
    programs = {
        "scontrol": '[[ $* == "show hostnames n[1-2]" ]] && printf "n1\\nn2\\n"',
        "srun": 'printf "%s\\n" "$@" "$MASTER_ADDR:$MASTER_PORT" "$SRUN_CPUS_PER_TASK"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path)} | ALLOCATION


def run_script(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPT, *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_one_task_per_gpu_is_started_with_everything_from_slurm(fake_slurm: dict[str, str]) -> None:
    done = run_script(fake_slurm, "--set", "name=a b; touch pwned")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("--kill-on-bad-exit=1", "--wait=60", "--unbuffered"),
        *("python", "-u", "-m", "softprompt_dist.train"),
        *("--recipe", "t5-xxl-superglue-boolq"),
        *("--deepspeed_config", "ds_configs/zero3_bf16.json"),
        *("--run-dir", "runs/xxl-41234"),
        *("--set", "name=a b; touch pwned"),
        "n1:21234",
        "6",
    ]


def test_what_it_names_exists() -> None:
    text = SCRIPT.read_text()
    assert "t5-xxl-superglue-boolq" in text
    assert "t5-xxl-superglue-boolq" in recipe_names()
    assert (REPOSITORY / "ds_configs" / "zero3_bf16.json").is_file()


@pytest.mark.parametrize("missing", ["SLURM_SUBMIT_DIR", "SLURM_JOB_NODELIST"])
def test_outside_a_job_it_stops_at_once(fake_slurm: dict[str, str], missing: str) -> None:
    del fake_slurm[missing]
    done = run_script(fake_slurm)
    assert done.returncode != 0
    assert missing in done.stderr
    assert done.stdout == ""
