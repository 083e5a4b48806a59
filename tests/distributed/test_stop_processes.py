"""Signals, hangs and second attempts, as clusters and users bring them about: to real commands."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import launch
import pytest
from faults import published

from tests import runs

TRAIN = "softprompt_dist.train"
SETTINGS = ("steps=3000", "evaluation.every_steps=9999", "checkpoint.every_steps=9999")
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port"],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port"],
    "nobody": [sys.executable],
}


def arguments(recipe, run_dir, *settings):
    overrides = [part for setting in settings for part in ("--set", setting)]
    return ["--recipe", str(recipe), "--run-dir", str(run_dir), *overrides]


def last_step(run_dir):
    lines = runs.metrics_without_time(run_dir, "train") if run_dir.exists() else []
    return lines[-1]["step"] if lines else 0


def why(run_dir):
    return (run_dir / "why").read_text().strip()


@contextmanager
def started(launcher, rest, log):
    """A command in a session of its own, so that its group can be signalled; none is left."""
    command = list(LAUNCHERS[launcher])
    command += [] if launcher == "nobody" else [str(launch.free_port())]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, "-m", TRAIN, *rest],
            cwd=launch.REPOSITORY,
            env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None or launcher != "nobody":
            with_group(process, signal.SIGKILL)
        process.wait()


def with_group(process, number):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def until(condition, process, log, timeout=90):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.drill("D3")
@pytest.mark.parametrize(
    ("launcher", "name", "send"),
    [
        ("deepspeed", "SIGTERM", os.kill),
        pytest.param("deepspeed", "SIGUSR1", os.killpg, marks=pytest.mark.slow),
        pytest.param("torchrun", "SIGTERM", os.kill, marks=pytest.mark.slow),
        ("nobody", "SIGUSR2", os.kill),
    ],
)
def test_a_signal_to_the_launcher_saves(  # noqa: PLR0913 - three of them are fixtures
    launcher, name, send, tiny_recipe, tmp_path, drilled
):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with started(launcher, arguments(tiny_recipe, run_dir, *SETTINGS), log) as process:
        until(lambda: last_step(run_dir) > 3, process, log)
        send(process.pid, getattr(signal, name))
        sent = time.monotonic()
        code = process.wait(timeout=60)
        seconds = time.monotonic() - sent
    step = last_step(run_dir)
    assert why(run_dir) == f"signal: {name} after step {step}, which is saved.", log.read_text()
    assert published(run_dir) == [step]
    assert (run_dir / "step").read_text() == f"{step}\n"
    assert not (run_dir / "attempt.json").exists()
    if name != "SIGTERM":  # for which the launchers have codes of their own
        assert code == 0, log.read_text()
    drilled(steps_redone=0, seconds=seconds)


@pytest.mark.drill("D12")
def test_a_hang_leaves_the_stacks_of_all_ranks(
    tiny_recipe, tmp_path, start_module_on_ranks, drilled
):
    run_dir = tmp_path / "run"
    settings = ("steps=9", "health.step_timeout_seconds=3", "checkpoint.every_steps=2")
    running = start_module_on_ranks(
        "faults",
        arguments(tiny_recipe, run_dir, *settings),
        2,
        env=launch.with_fault("1 4 3600"),
    )
    running.wait_until(lambda: last_step(run_dir) == 3, timeout=90)
    hung = time.monotonic()
    outputs = running.wait(timeout=60, check=False)
    seconds = time.monotonic() - hung
    assert all(output.returncode in (1, 5) for output in outputs)
    assert 5 in [output.returncode for output in outputs]
    assert seconds < 3 + 5
    assert why(run_dir).startswith("hang: Rank ")
    assert "no progress for 3 s while step 4" in why(run_dir)
    stacks = [(run_dir / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "all_reduce_sum" in stacks[0]
    assert "faults.py" in stacks[1]
    assert published(run_dir) == [2]
    drilled(steps_redone=last_step(run_dir) - 2, seconds=seconds)


@pytest.mark.drill("D22", "D23")
def test_one_run_at_a_time_and_a_halted_one_never_again(
    tiny_recipe, tmp_path, start_module_on_ranks, run_module_on_ranks, drilled
):
    run_dir = tmp_path / "run"
    given = arguments(tiny_recipe, run_dir, "steps=20", "checkpoint.every_steps=5")
    first = start_module_on_ranks(
        "faults",
        given,
        1,
        env={"SLURM_JOB_ID": "4711", **launch.with_fault("0 13 3")},
    )
    first.wait_until(lambda: last_step(run_dir) == 12, timeout=90)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    (refused,) = run_module_on_ranks(TRAIN, given, 1, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not by the clock: others may hold the cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert refused.returncode == 2
    assert "is in use by Slurm job 4711, process " in refused.stderr
    assert f" on {os.uname().nodename}" in refused.stderr
    assert why(run_dir) == "running"

    first.kill(0, signal.SIGSTOP)
    begun = time.monotonic()
    run_module_on_ranks(TRAIN, given, 1)
    drilled(steps_redone=12 - 10, seconds=time.monotonic() - begun)
    before = files_of(run_dir)
    first.kill(0, signal.SIGCONT)
    (woken,) = first.wait(timeout=60, check=False)
    assert woken.returncode == 6
    assert "was taken over by nobody knows whom" in woken.stderr
    assert files_of(run_dir) == before


def files_of(run_dir):
    """Content of all that a run publishes, and of what tells of its end."""
    return {
        path: path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != "metrics.jsonl" and "tensorboard" not in path.parts
    }


@pytest.mark.drill("D4")
def test_a_signal_before_the_ranks_meet_ends_the_one_that_waits(
    tiny_recipe, tmp_path, start_module_on_ranks
):
    run_dir = tmp_path / "run"
    running = start_module_on_ranks(
        TRAIN,
        arguments(tiny_recipe, run_dir),
        1,
        env={"WORLD_SIZE": "2", "SOFTPROMPT_OUTCOME": str(run_dir)},
    )
    # It listens at the port from the moment that it waits for the other.
    running.wait_until(lambda: is_listening(running.port), timeout=60)
    running.kill(0, signal.SIGTERM)
    begun = time.monotonic()
    (output,) = running.wait(timeout=30)
    assert time.monotonic() - begun < 5
    assert "Stopped: SIGTERM before the ranks met." in output.stdout
    assert why(run_dir) == "signal: SIGTERM before the ranks met."


def is_listening(port):
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    lines += Path("/proc/net/tcp6").read_text().splitlines()[1:]
    listening = "0A"
    return any(
        line.split()[1].endswith(f":{port:04X}") and line.split()[3] == listening for line in lines
    )
