from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from softprompt_dist import corpus
from softprompt_dist.errors import ConfigError, DataError, NonFiniteLossError
from softprompt_dist.outcome_files import FOLDER_VARIABLE, silent_where
from softprompt_dist.parallel import verb
from softprompt_dist.parallel.verb import VerbParser, run_verb


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verb, "_GRACE_SECONDS", 0.0)


def failing(error: BaseException):
    def main(argv: object = None) -> None:
        raise error

    return main


def exit_code(main, argv=()) -> object:
    with pytest.raises(SystemExit) as ended:
        run_verb(main, list(argv))
    return ended.value.code


def test_success_is_silent_and_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda argv: None) == 0
    assert capsys.readouterr() == ("", "")


def test_user_error_is_one_message_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(failing(DataError("row 7 is empty"))) == 2
    assert capsys.readouterr().err == "error: row 7 is empty\n"
    assert exit_code(failing(NonFiniteLossError("loss is nan"))) == 4


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(failing(DataError("row 7 is empty")), ["--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_full_or_forbidden_disk_is_a_user_error(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(failing(OSError(number, os.strerror(number), "runs/demo"))) == 2
    said = capsys.readouterr().err
    assert "runs/demo" in said
    assert os.strerror(number) in said
    assert "--run-dir" in said


def test_ctrl_c_has_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: Interrupted.\n"


@pytest.mark.parametrize("bug", [ValueError("ours"), OSError(errno.EBADF, "ours")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        run_verb(failing(bug), [])


NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3384, "
REASONS = {
    "a GPU is full": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 "
            "GiB of which 1.12 GiB is free.\nOf the allocated memory 70 GiB is allocated by PyTorch"
        ),
        r"fatal: No memory is left for rank 1 on \S+ CUDA out of memory\. .*batch.micro_batch_size",
    ),
    "a GPU is full, says CUDA": (
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
        "fatal: No memory is left",
    ),
    "a GPU is full, says cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "fatal: No memory is left",
    ),
    "the host is full": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 412316860416 bytes. Error code 12 (Cannot allocate)"
        ),
        "fatal: No memory is left",
    ),
    "Python's memory": (MemoryError(), "fatal: No memory is left"),
    "an id outside its table": (
        torch.AcceleratorError(
            "CUDA error: device-side assert triggered\nCUDA kernel errors might"
        ),
        "fatal: rank 1 on .*device-side assert triggered. As a rule an id lies outside",
    ),
    "broken memory": (
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel"),
        r"error: The GPU of rank 1 on \S+ failed: CUDA error: uncorrectable ECC .*--exclude=",
    ),
    "a stray address": (
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        "error: The GPU of rank 1",
    ),
    "a broken GPU met by NCCL": (
        dist.DistBackendError(
            f"{NCCL}unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function "
            "failed.\nLast error:\nCuda failure 719 'unspecified launch failure'"
        ),
        "error: The GPU of rank 1 on .* Cuda failure 719 'unspecified launch failure'",
    ),
    "a peer is gone": (
        dist.DistBackendError(
            f"{NCCL}remote process exited or there was a network error, NCCL version 2.27.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer n2"
        ),
        "error: Another rank has ended, .*socketProgress: Connection closed by remote peer n2",
    ),
    "a peer is gone, and NCCL's watchdog was first": (
        dist.DistBackendError("NCCL communicator was aborted on rank 1."),
        "error: Another rank has ended",
    ),
    "a peer hangs": (
        dist.DistBackendError(
            "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, "
            "OpType=_ALLGATHER_BASE) ran for 7200029 milliseconds before timing out."
        ),
        "error: Another rank has ended, or is out of reach",
    ),
    "the store is gone": (
        dist.DistNetworkError(
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server "
            "shutdown or crash?"
        ),
        "error: Another rank has ended",
    ),
    "a peer is gone, says gloo": (
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4"),
        "error: Another rank has ended",
    ),
    "no room for NCCL": (
        dist.DistBackendError(
            f"{NCCL}unhandled system error\nncclSystemError: System call (e.g. socket, malloc) or "
            "external library call failed or device error.\nLast error:\nError while creating "
            "shared memory segment /dev/shm/nccl-7MPwXW (size 9637888)"
        ),
        "error: NCCL failed for rank 1 .*shared memory segment /dev/shm/nccl-7MPwXW",
    ),
    "two ranks on a GPU": (
        dist.DistBackendError(
            f"{NCCL}invalid usage\nncclInvalidUsage: This usually reflects invalid usage of "
            "NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on 7"
        ),
        "fatal: rank 1 .*Duplicate GPU detected",
    ),
    "a bug": (KeyError("w\u00f6rd"), "error: A bug: KeyError: 'w\u00f6rd'. See the log"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_tells_what_ended_a_rank(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, reason = REASONS[case]
    silent_where(lambda: False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(verb, "_world_is_up", lambda: True)
    monkeypatch.setattr(verb, "_exit_now", sys.exit)
    with pytest.raises(KeyError if case == "a bug" else SystemExit) as ended:
        run_verb(failing(error), [])
    why = (tmp_path / "why").read_text()
    assert re.match(reason, why), why
    if case != "a bug":
        assert capsys.readouterr().err.startswith("[rank 1] error: ")
        assert ended.value.code not in (0, None)


def test_another_rank_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert exit_code(failing(DataError("my disk is full"))) == 2
    assert capsys.readouterr().err == "[rank 3] error: my disk is full\n"


def parser() -> VerbParser:
    made = VerbParser("tune", "Tune.")
    made.add_recipe_options()
    return made


def test_wrong_option_is_a_config_error_with_usage() -> None:
    with pytest.raises(ConfigError, match=r"(?s)softprompt tune: .*--recpie.*usage:"):
        parser().parse_args(["--recpie", "demo"])


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    parser = VerbParser("train", "Train.")
    parser.add_recipe_options()
    words = ["--run-dir=~/a", "--recipe", "~/r.yaml", "--set", "name=~", "--set=seed=~"]
    options = parser.parse_args(words)
    assert (options.run_dir, options.recipe) == ("/home/of/mine/a", "/home/of/mine/r.yaml")
    assert options.overrides == ["name=~", "seed=~"]
    shown = corpus.build_parser().parse_args(["show", "~/c4"])
    assert str(shown.folder) == "/home/of/mine/c4"


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(ConfigError):
        parser().parse_args(["--rec", "demo"])


def test_launcher_s_local_rank_is_taken_and_overrides_collect() -> None:
    typed = ["--local_rank=1", "--set", "a.b=1", "--recipe", "demo", "--set", "c=2"]
    options = parser().parse_args(typed)
    assert options.overrides == ["a.b=1", "c=2"]
    assert options.recipe == "demo"
    assert not options.debug


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_help_comes_from_one_rank(
    rank: str, prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert exit_code(parser().parse_args, ["--help"]) == 0
    assert ("usage: softprompt tune" in capsys.readouterr().out) == prints
