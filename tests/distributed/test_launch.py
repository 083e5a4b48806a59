import os
import signal
import time

import launch
import pytest
import torch
import torch.distributed as dist

from softprompt_dist.parallel import ranks


def sum_of_ranks(factor):
    tensor = torch.tensor([float(ranks.rank()) * factor])
    return {"sum": ranks.all_reduce_sum(tensor).item(), "rank": dist.get_rank()}


def fail_on_rank_1():
    print("before the failure")
    if ranks.rank() == 1:
        raise ValueError("planted")
    ranks.gather_objects(0)


def sleep_for_ever():
    print("asleep", flush=True)
    time.sleep(600)


def test_a_function_runs_on_every_rank(run_on_ranks):
    assert run_on_ranks(sum_of_ranks, 2, factor=3) == [
        {"sum": 3.0, "rank": 0},
        {"sum": 3.0, "rank": 1},
    ]


def test_a_failure_shows_the_output_of_all_ranks(run_on_ranks):
    with pytest.raises(launch.RankError, match="planted") as failure:
        run_on_ranks(fail_on_rank_1, 2)
    assert len(failure.value.outputs) == 2
    assert "before the failure" in failure.value.outputs[1].stdout


def test_a_hang_ends_at_the_limit_with_no_process_left(rank_logs):
    folder = rank_logs()
    with pytest.raises(launch.RankError, match="Not all ranks ended in 8 s"):
        launch.run_function_on_ranks(sleep_for_ever, 1, folder, timeout=8)


def test_a_module_gets_its_arguments_and_environment(run_module_on_ranks):
    outputs = run_module_on_ranks("json.tool", ["--help"], 2, env={"COLUMNS": "99"})
    assert all("--sort-keys" in output.stdout for output in outputs)
    outputs = run_module_on_ranks("json.tool", ["/does/{not}/exist"], 1, check=False)
    assert outputs[0].returncode != 0
    assert "/does/{not}/exist" in outputs[0].stderr


def test_one_rank_can_be_killed(start_module_on_ranks):
    running = start_module_on_ranks("http.server", ["0", "--bind", "127.0.0.1"], 2)
    running.kill(1)
    assert running.processes[1].returncode == -signal.SIGKILL
    assert running.processes[0].poll() is None
    running.kill(0)
    with pytest.raises(ProcessLookupError):
        os.kill(running.processes[0].pid, 0)
