import os
import subprocess
import sys
import time

import launch
import pytest

from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import check_one_job

JOIN = """
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.parallel import ranks
def main(argv):
    join_world()
    join_world()
    print(ranks.rank(), "of", ranks.world_size())
    leave_world()
run_verb(main, [])
"""


def check_job(nonces):
    try:
        check_one_job(nonces[ranks.rank()])
    except MachineError as error:
        return [str(error), error.on_all_ranks]
    return "one job"


@pytest.mark.drill("D24")
def test_ranks_of_two_jobs_refuse_each_other(run_on_ranks):
    assert run_on_ranks(check_job, 2, nonces=["a", "a"]) == ["one job"] * 2
    first, second = run_on_ranks(check_job, 2, nonces=["a", "b"])
    assert first == second
    assert "Ranks of different jobs met at 127.0.0.1:" in first[0]
    assert first[1]


def join(env):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environ = {k: v for k, v in os.environ.items() if k not in names} | env
    return subprocess.run(
        [sys.executable, "-c", JOIN],
        cwd=launch.REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_a_lone_process_joins_without_a_launcher_and_says_nothing_else():
    join({})  # the first join of an environment compiles, and says so
    done = join({})
    assert (done.returncode, done.stdout) == (0, "0 of 1\n"), done.stderr
    assert launch.without_progress(done.stderr) == ""


@pytest.mark.drill("D25")
def test_a_stale_lock_ends_the_start_instead_of_hanging(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    done = join({"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {lock} is 36")
    assert "Traceback" not in done.stderr


@pytest.mark.drill("D26")
def test_a_half_set_environment_is_refused():
    done = join({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
    assert done.returncode == 2
    assert "without RANK, LOCAL_RANK, MASTER_PORT" in done.stderr
