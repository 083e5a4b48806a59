from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from softprompt_dist.checks.machine import check_accelerator
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import extensions, ranks
from softprompt_dist.parallel.extensions import (
    EXTENSION,
    check_extension_can_be_had,
    choose_extensions_folder,
    fetch_build,
    forget_build,
    is_builder_alive,
    keep_build,
    wait_for_builder,
)
from softprompt_dist.parallel.join import (
    check_gpus,
    check_rank_variables,
    choose_backend,
    fill_rank_variables,
    first_host,
    join_world,
    local_world_size,
    set_threads,
)
from softprompt_dist.parallel.meeting import Newcomer, agree, job_nonce

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
COMPLETE = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "9",
}


def test_a_lone_process_is_a_world_of_one() -> None:
    environ: dict[str, str] = {}
    fill_rank_variables(environ)
    check_rank_variables(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("0", "1")


def test_slurm_s_variables_become_ranks() -> None:
    environ = dict(SLURM)
    fill_rank_variables(environ)
    check_rank_variables(environ)
    assert (
        environ.items()
        >= {
            "RANK": "9",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "16",
            "MASTER_ADDR": "gpu003",
            "MASTER_PORT": str(20000 + 123456 % 20000),
        }.items()
    )
    assert local_world_size(environ) == 8


def test_what_the_script_exported_wins_over_slurm_s() -> None:
    environ = SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    fill_rank_variables(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "7")


def test_a_launcher_s_variables_are_left_alone() -> None:
    environ = SLURM | COMPLETE
    fill_rank_variables(environ)
    assert environ == SLURM | COMPLETE


@pytest.mark.drill("D26")
def test_a_batch_script_without_srun_is_refused() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}
    with pytest.raises(MachineError, match=r"8 tasks.*srun"):
        fill_rank_variables(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu[003-010,12],login1", "gpu003"),
        ("a,b", "a"),
        ("rack[1-2]n[07,09]", "rack1n07"),
        ("gpu[5]-ib,x", "gpu5-ib"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.drill("D26")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE=2.* without RANK"),
        ({"MASTER_ADDR": None, "LOCAL_RANK": ""}, "without LOCAL_RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        ({"RANK": "-1"}, "RANK=-1 must be a whole number"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
    ],
)
def test_half_set_variables_are_refused(change: dict[str, str | None], message: str) -> None:
    environ = {k: v for k, v in (COMPLETE | change).items() if v is not None}
    fill_rank_variables(environ)
    with pytest.raises(MachineError, match=message):
        check_rank_variables(environ)


def test_more_ranks_than_gpus_are_refused_with_the_remedy() -> None:
    with pytest.raises(MachineError, match=r"2 ranks.*1 GPU.*--num_gpus 1.*DS_ACCELERATOR=cpu"):
        check_gpus(1, COMPLETE | {"LOCAL_SIZE": "2"})
    with pytest.raises(MachineError, match=r"8 ranks.*4 GPU"):
        check_gpus(4, SLURM)


@pytest.mark.parametrize(
    ("num_gpus", "environ"),
    [
        (8, COMPLETE | {"WORLD_SIZE": "8", "LOCAL_SIZE": "8"}),
        (8, COMPLETE | {"WORLD_SIZE": "16", "LOCAL_SIZE": "8"}),
        (8, SLURM),
        (1, SLURM),  # --gpus-per-task=1 shows each rank only its own
    ],
)
def test_a_gpu_for_each_rank_is_accepted(num_gpus: int, environ: dict[str, str]) -> None:
    check_gpus(num_gpus, environ)


def test_the_cpu_can_be_chosen_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert ranks.device() == torch.device("cuda", 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert ranks.device() == torch.device("cpu")


def test_jobs_are_told_apart() -> None:
    assert job_nonce(SLURM) == job_nonce(SLURM | {"SLURM_PROCID": "3"})
    assert job_nonce(SLURM) != job_nonce(SLURM | {"SLURM_RESTART_COUNT": "1"})
    assert job_nonce(SLURM | {"SOFTPROMPT_RUN_ID": "mine"}) == "mine"
    assert job_nonce(COMPLETE) == ""


NONCE = """
import os
from softprompt_dist.parallel.meeting import job_nonce
print(job_nonce(os.environ))
"""


@pytest.mark.parametrize(
    "wrapper",
    [
        [],
        ["timeout", "60"],
        ["sh", "-c", '"$@"; exit $?', "sh"],
        [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"],
    ],
    ids=["none", "timeout", "sh", "python"],
)
def test_a_rank_in_a_wrapper_knows_its_launcher(wrapper: list[str]) -> None:
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", NONCE],
        env=environ | COMPLETE | {"LOCAL_SIZE": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"launcher {os.getpid()} on ")


def met(*newcomers: Newcomer, already_there: Sequence[int] = ()) -> list[str]:
    """What `agree` says to each of the newcomers; empty: nothing."""
    store = HashStore()
    for rank in already_there:
        store.add(f"softprompt/meeting/claims/{rank}", 1)

    def said(newcomer: Newcomer) -> str:
        try:
            agree(store, newcomer, len(newcomers))
        except MachineError as error:
            return str(error) if error.on_all_ranks else "of one rank"
        return ""

    with ThreadPoolExecutor(len(newcomers)) as pool:
        return list(pool.map(said, newcomers))


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "h")
    monkeypatch.setenv("MASTER_PORT", "9")


def test_ranks_that_are_alike_agree() -> None:
    assert met(Newcomer(0, "nccl", "a"), Newcomer(1, "nccl", "a")) == ["", ""]
    assert met(Newcomer(0, "nccl", "a"), Newcomer(1, "nccl", "")) == ["", ""], "cut off from it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "gloo"}, "rank 1 on b would use the CPU (gloo), and rank 0, 2 on a would use"),
        ({"backend": "", "problem": "No GPU."}, "Rank 1 on b: No GPU."),
        ({"job": "other"}, "Ranks of different jobs met at h:9 (mine; other)"),
    ],
    ids=["backend", "problem", "job"],
)
def test_what_one_rank_lacks_is_said_to_all(
    place: None, changes: dict[str, str], message: str
) -> None:
    of_job = [Newcomer(rank, "nccl", "mine", host="a") for rank in range(3)]
    of_job[1] = replace(of_job[1], host="b", **changes)
    first, *others = met(*of_job)
    assert message in first
    assert others == [first, first]


def test_a_rank_that_is_there_twice_is_refused(place: None) -> None:
    first, second = met(Newcomer(0, "gloo", ""), Newcomer(1, "gloo", ""), already_there=[1])
    assert "Ranks of different jobs met at h:9 (another process is rank 1 already)" in first
    assert first == second


def test_a_cuda_build_without_a_gpu_is_refused_unless_the_cpu_is_asked_for(
    lone_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(MachineError, match=r"can use none here: .*nvidia-smi.*DS_ACCELERATOR=cpu"):
        join_world()
    assert [finding.status for finding in check_accelerator()] == ["fail"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_backend() == "gloo"
    assert [finding.status for finding in check_accelerator()] != ["fail"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cores_are_divided_among_the_ranks(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    set_threads({"WORLD_SIZE": "8", "LOCAL_SIZE": "4"})
    assert torch.get_num_threads() == 3
    set_threads({"WORLD_SIZE": "64"})
    assert torch.get_num_threads() == 1
    set_threads({"WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "5"})
    assert torch.get_num_threads() == 5
    set_threads({"WORLD_SIZE": "1", "OMP_NUM_THREADS": "7"})
    assert torch.get_num_threads() == 5


def test_extensions_folder_is_ours_unless_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # setenv first, so that what the code sets is undone.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    folder = choose_extensions_folder()
    assert folder.is_relative_to(tmp_path)
    assert torch.__version__ in folder.name
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/theirs")
    assert choose_extensions_folder() == Path("/theirs")


LOADS = """
from softprompt_dist.parallel.deepspeed_start import start_deepspeed
from softprompt_dist.parallel.join import join_world, leave_world
join_world()
start_deepspeed()
leave_world()
"""


def test_a_job_s_own_folder_has_what_an_earlier_job_compiled(
    extensions_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two jobs, whose folders are gone after them, the second compiles nothing."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)

    def job(name: str) -> Path:
        own = {"TORCH_EXTENSIONS_DIR": str(tmp_path / name)}
        subprocess.run([sys.executable, "-c", LOADS], check=True, env=os.environ | own)
        return tmp_path / name / EXTENSION

    if any((extensions_folder / EXTENSION).glob("*.so")):  # else the first job takes a minute
        shutil.copytree(extensions_folder / EXTENSION, tmp_path / "first" / EXTENSION)
    first = job("first")
    compiled = (first / f"{EXTENSION}.so").stat().st_mtime_ns
    (first / "lock").touch()  # the job is killed in a build
    second = job("second")
    assert not (second / "lock").exists()
    assert (second / f"{EXTENSION}.so").stat().st_mtime_ns == compiled


def test_what_is_kept_of_a_build_is_whole_and_knows_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))

    def own(name: str) -> Path:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / name))
        return tmp_path / name / "async_io"

    built = own("first")
    built.mkdir(parents=True)
    keep_build("async_io")  # nothing is there yet
    (built / "async_io.so").write_bytes(b"first")
    (built / "lock").touch()
    keep_build("async_io")  # somebody is building
    fetch_build("async_io")
    assert not list(tmp_path.glob("cache/kept_extensions/*/*"))
    (built / "lock").unlink()
    keep_build("async_io")
    fetched = own("second")
    fetch_build("async_io")
    assert (fetched / "async_io.so").read_bytes() == b"first"
    (fetched / "async_io.so").write_bytes(b"second")
    keep_build("async_io")
    fetch_build("async_io")
    assert (fetched / "async_io.so").read_bytes() == b"second", "what is there is left alone"
    third = own("third")
    fetch_build("async_io")
    assert (third / "async_io.so").read_bytes() == b"first"
    forget_build("async_io")
    fourth = own("fourth")
    fetch_build("async_io")
    assert not fourth.exists()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(extensions, "_SURE_SECONDS", 0.3)
    monkeypatch.setattr(extensions, "_POLL_SECONDS", 0.05)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    path = tmp_path / EXTENSION / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def remove_soon(lock: Path) -> threading.Thread:
    def remove() -> None:
        time.sleep(1.0)
        lock.unlink()

    thread = threading.Thread(target=remove)
    thread.start()
    return thread


def test_a_lock_that_nobody_holds_is_refused_with_its_remedy(lock: Path) -> None:
    with pytest.raises(MachineError, match=f"no running process holds it.*rm '{lock}'"):
        wait_for_builder(lock, several_nodes=False)
    assert lock.exists()


def test_an_old_lock_is_refused_even_on_several_nodes(lock: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    with pytest.raises(MachineError, match="3600 s old"):
        wait_for_builder(lock, several_nodes=True)


def test_a_fresh_lock_may_be_another_node_s(lock: Path) -> None:
    thread = remove_soon(lock)
    wait_for_builder(lock, several_nodes=True)
    thread.join()
    assert not lock.exists()


def test_a_living_builder_is_waited_for(lock: Path) -> None:
    with lock.open():
        assert is_builder_alive(lock)
        thread = remove_soon(lock)
        wait_for_builder(lock, several_nodes=False)
    thread.join()
    assert not is_builder_alive(lock)


def test_missing_build_tools_are_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.unlink()
    monkeypatch.setattr(extensions.shutil, "which", lambda program, path=None: None)
    with pytest.raises(MachineError, match=r"no ninja.*no C\+\+ compiler.*apt-get install g\+\+"):
        check_extension_can_be_had(lock.parents[1], several_nodes=False)


def test_a_missing_compiler_does_not_matter_once_built(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match="no-such-compiler"):
        check_extension_can_be_had(lock.parents[1], several_nodes=False)
    lock.with_name(f"{EXTENSION}.so").touch()
    assert check_extension_can_be_had(lock.parents[1], several_nodes=False)
