"""Through DeepSpeed's own launcher, which ends all ranks when the first one fails."""

import subprocess
import sys
from pathlib import Path

import launch
import pytest

DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def deepspeed(*arguments):
    return subprocess.run(
        [DEEPSPEED, "--master_port", str(launch.free_port()), "--num_gpus", "2", *arguments],
        cwd=launch.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("on_main", "error: rank 0 cannot write"),
        ("together", "error: rank 1 cannot read"),
        ("alone", "[rank 1] error: rank 1 is ill"),
        ("--wrong", "error: softprompt fail: "),
    ],
)
def test_one_rank_speaks_and_the_job_fails(how, message):
    done = deepspeed("--module", "tests.distributed.failing_verb", how)
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(message)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_the_command_of_the_readme_as_typed(tiny_recipe):
    done = deepspeed("-m", "softprompt_dist.train", "--recipe", str(tiny_recipe), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("name: tiny\n") == 1, "rank 0 alone prints"
    assert "Traceback" not in done.stderr
