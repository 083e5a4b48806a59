import os
import signal
import subprocess
import sys
import time

import launch
import pytest

JOIN = """
import sys
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.parallel import ranks
def main(argv):
    join_world()
    join_world()
    print(ranks.rank(), "of", ranks.world_size(), "deepspeed" in sys.modules)
    leave_world()
run_verb(main, [])
"""
SHARD = """
from softprompt_dist.parallel.deepspeed_start import start_deepspeed
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb
def main(argv):
    join_world()
    start_deepspeed()
    start_deepspeed()
    print("started")
    leave_world()
run_verb(main, [])
"""
LEAVE = """
import time
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.parallel import ranks
def main(argv):
    join_world()
    time.sleep(20 * ranks.rank())
    leave_world(1.0)
run_verb(main, [])
"""


def start(env, code=JOIN, wrapper=()):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.Popen(
        [*wrapper, sys.executable, "-c", code],
        cwd=launch.REPOSITORY,
        env=environ | {"DS_ACCELERATOR": "cpu"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process):
    """Its exit code, standard output and standard error; nothing of it is left."""
    try:
        out, err = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, launch.without_progress(err)


def start_rank(rank, port, wrapper=(), code=JOIN, **env):
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return start(variables | env, code, wrapper)


@pytest.mark.drill("D24")
def test_ranks_of_two_jobs_refuse_each_other():
    port = launch.free_port()
    processes = [start_rank(rank, port, SOFTPROMPT_RUN_ID=f"job-{rank}") for rank in (0, 1)]
    for code, _, said in map(ended, processes):
        assert code == 2
        assert f"Ranks of different jobs met at 127.0.0.1:{port} (job-0; job-1)" in said
        assert "set SOFTPROMPT_RUN_ID to the same word" in said


def test_each_rank_may_have_a_wrapper_of_its_own():
    port = launch.free_port()
    wrappers = [["timeout", "300"], ["sh", "-c", '"$@"; exit $?', "sh"]]
    processes = [start_rank(rank, port, wrappers[rank]) for rank in (0, 1)]
    assert [ended(process) for process in processes] == [
        (0, "0 of 2 False\n", ""),
        (0, "1 of 2 False\n", ""),
    ]


def test_a_rank_without_the_others_kind_of_device_is_refused_by_all_at_once():
    port = launch.free_port()
    processes = [start_rank(0, port), start_rank(1, port, DS_ACCELERATOR="cuda")]
    for code, _, said in map(ended, processes):
        assert code == 2
        assert "Rank 1 on " in said
        assert "set DS_ACCELERATOR=cpu" in said


def test_a_rank_does_not_wait_for_hours_for_one_that_never_ends():
    port = launch.free_port()
    waiting, busy = [start_rank(rank, port, code=LEAVE) for rank in (0, 1)]
    code, _, said = ended(waiting)
    assert code == 5
    assert said.startswith("error: Rank 0 has waited 1 s for the other ranks to end.")
    assert busy.poll() is None
    os.killpg(busy.pid, signal.SIGKILL)
    busy.communicate()


def test_a_lone_process_joins_without_a_launcher_and_says_nothing_else():
    assert ended(start({})) == (0, "0 of 1 False\n", "")


def test_deepspeed_starts_in_a_world_that_was_joined_and_says_nothing_else():
    ended(start({}, SHARD))  # the first start of an environment compiles, and says so
    assert ended(start({}, SHARD)) == (0, "started\n", "")


@pytest.mark.drill("D25")
def test_a_stale_lock_ends_the_start_instead_of_hanging(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    code, _, said = ended(start({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, SHARD))
    assert code == 2
    assert said.startswith(f"error: {lock} is 36")
    assert "Traceback" not in said


@pytest.mark.drill("D26")
def test_a_half_set_environment_is_refused():
    code, _, said = ended(start({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}))
    assert code == 2
    assert "without RANK, LOCAL_RANK, MASTER_PORT" in said
