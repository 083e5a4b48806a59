from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from softprompt_dist import durable
from softprompt_dist.errors import (
    DirectoryInUseError,
    OwnerUnknownError,
    StopFileError,
    SupersededError,
)
from softprompt_dist.lifecycle import ownership
from softprompt_dist.lifecycle.ownership import (
    Owner,
    Ownership,
    begin_in,
    is_alive,
    read_owner,
    refuse_if_in_use,
    seconds_since_heartbeat,
)
from softprompt_dist.outcome_files import FOLDER_VARIABLE

CLAIM = """
import sys, time
from pathlib import Path
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.lifecycle.ownership import Ownership
try:
    Ownership(Path(sys.argv[1])).claim()
    print("claimed", flush=True)
    time.sleep(600)
except SoftpromptError as error:
    print(type(error).__name__, flush=True)
"""

Claim = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "RANK", "SLURM_PROCID", FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Claim]:
    """Starts a process that claims the directory and lives on."""
    processes: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def elsewhere(folder: Path, seconds_ago: float | None, **changes: object) -> Owner:
    """Of an attempt on another machine, whose heart beat last so long ago."""
    owner = replace(Owner.here({}), host="another-host", place="there", pid=1, **changes)  # type: ignore[arg-type]
    (folder / "attempt.json").write_text(json.dumps(asdict(owner)))
    if seconds_ago is not None:
        (folder / "heartbeat.json").write_text("{}")
        then = time.time() - seconds_ago
        os.utime(folder / "heartbeat.json", (then, then))
    return owner


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path: Path, claim: Claim) -> None:
    first = claim(SLURM_JOB_ID="4711")
    assert heard(first) == "claimed"
    with pytest.raises(DirectoryInUseError) as refused:
        Ownership(tmp_path).claim()
    named = f"Slurm job 4711, process {first.pid} on {socket.gethostname()}"
    assert named in str(refused.value)
    assert "--run-dir" in str(refused.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_whoever_is_dead_or_halted_gives_way(
    tmp_path: Path, claim: Claim, number: signal.Signals
) -> None:
    first = claim()
    assert heard(first) == "claimed"
    old = read_owner(tmp_path)
    assert old is not None
    first.send_signal(number)
    deadline = time.monotonic() + 10
    while is_alive(old, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    mine = Ownership(tmp_path)
    mine.claim()
    mine.check()
    with pytest.raises(SupersededError, match=f"taken over by process {os.getpid()}"):
        Ownership(tmp_path, old).check()


def test_another_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    mine = Owner.here({})
    assert is_alive(mine, tmp_path)
    assert not is_alive(replace(mine, started=mine.started - 1), tmp_path)


def test_of_two_claims_at_one_moment_one_is_left(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def claim_one(owner: Owner) -> None:
        try:
            Ownership(tmp_path, owner).claim()
            outcomes.append("claimed")
        except DirectoryInUseError:
            outcomes.append("refused")

    # Neither is alive by its number, so that none is refused before it has written its name.
    owners = [replace(Owner.here({}), token=token * 32, started=0) for token in "ab"]
    threads = [threading.Thread(target=claim_one, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["claimed", "refused"]


def test_the_same_job_started_again_takes_over_a_living_attempt(
    tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = claim(SLURM_JOB_ID="7")
    assert heard(first) == "claimed"
    old = read_owner(tmp_path)
    again = claim(SLURM_JOB_ID="7")
    assert heard(again) == "DirectoryInUseError", "a second step of the same start is no restart"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Ownership(tmp_path).claim()
    with pytest.raises(SupersededError):
        Ownership(tmp_path, old).check()


def test_elsewhere_the_heart_decides(tmp_path: Path) -> None:
    owner = elsewhere(tmp_path, seconds_ago=None)
    assert not is_alive(owner, tmp_path), "a heart that never beat"
    elsewhere(tmp_path, seconds_ago=50)
    with pytest.raises(DirectoryInUseError, match="process 1 on another-host"):
        refuse_if_in_use(tmp_path)
    elsewhere(tmp_path, seconds_ago=70)
    refuse_if_in_use(tmp_path)


def test_the_file_systems_clock_counts_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, seconds_ago=30)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 25 < seconds_since_heartbeat(tmp_path) < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt.json", "heartbeat.json"]
    future = os.stat(tmp_path).st_mtime + 1000
    os.utime(tmp_path / "heartbeat.json", (future, future))
    assert seconds_since_heartbeat(tmp_path) == 0.0


def test_who_may_only_read_is_answered_by_the_own_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, seconds_ago=30)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "touch", denied)
    assert 25 < seconds_since_heartbeat(tmp_path) < 60


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"token": "x", "host": 3, "pid": 1, "started": 1, "job": "", "restart": 0}',
        b'{"token": "x", "host": "h", "pid": true, "started": 1, "job": "", "restart": 0}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_nobody_can_read_names_no_owner(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attempt.json").write_bytes(content)
    assert read_owner(tmp_path) is None
    Ownership(tmp_path).claim()


def test_who_leaves_lets_the_next_in_at_once_and_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Ownership(tmp_path)
    first.claim()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = Ownership(tmp_path)
    second.claim()
    first.release()
    second.check()
    assert (first.is_lost(), first.is_held()) == (True, False)
    assert (second.is_lost(), second.is_held()) == (False, True)
    second.release()
    assert (second.is_lost(), second.is_held()) == (False, False)
    monkeypatch.setattr(durable, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(OwnerUnknownError, match=r"attempt.json cannot be read \(.*No such file"):
        second.check()
    monkeypatch.undo()
    monkeypatch.setattr(ownership, "_GONE_SECONDS", 0.2)
    with pytest.raises(SupersededError, match="taken over by nobody knows whom"):
        second.check()
    assert second.is_over()


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`unreadable(number, times)`: so often attempt.json answers with that error."""
    real = Path.read_bytes
    monkeypatch.setattr(durable, "_FIRST_PAUSE_SECONDS", 0.001)

    def arrange(number: int, times: int) -> None:
        left = iter(range(times))

        def read_bytes(path: Path) -> bytes:
            if path.name == "attempt.json" and next(left, None) is not None:
                raise OSError(number, os.strerror(number), str(path))
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    return arrange


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ENOENT])
def test_an_owner_that_cannot_be_read_for_a_while_is_the_owner_still(
    tmp_path: Path, unreadable: Callable[..., None], number: int
) -> None:
    mine = Ownership(tmp_path)
    mine.claim()
    unreadable(number, times=8)
    assert not mine.is_over(), "the run goes on"
    assert not mine.is_held(), "and says nothing in the directory"
    mine.check()
    assert mine.is_held()


def test_an_owner_that_cannot_be_read_for_too_long_ends_with_the_reason(
    tmp_path: Path, unreadable: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Ownership(tmp_path)
    mine.claim()
    unreadable(errno.ESTALE, times=10_000)
    assert not mine.is_over()
    monkeypatch.setattr(durable, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(OwnerUnknownError, match=r"Stale file handle.* goes on from the newest"):
        mine.check()
    monkeypatch.setattr(durable, "PATIENCE_SECONDS", 0.0)
    assert mine.is_over()


def test_a_directory_whose_owner_cannot_be_read_is_not_free(
    tmp_path: Path, claim: Claim, unreadable: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heard(claim()) == "claimed"
    unreadable(errno.ESTALE, times=4)
    with pytest.raises(DirectoryInUseError):
        Ownership(tmp_path).claim()
    unreadable(errno.ESTALE, times=10_000)
    monkeypatch.setattr(durable, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(OSError, match="Stale file handle"):
        Ownership(tmp_path).claim()


def test_before_the_ranks_meet_all_that_stands_against_a_run_is_said(
    tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "why").write_text("error: of an earlier attempt\n")
    os.utime(tmp_path / "why", (1.0, 1.0))
    begin_in(tmp_path)
    assert (tmp_path / "why").read_text() == "running\n"
    assert os.environ[FOLDER_VARIABLE] == str(tmp_path)
    (tmp_path / "STOP").write_text("enough\n")
    with pytest.raises(StopFileError, match="enough"):
        begin_in(tmp_path)
    (tmp_path / "STOP").unlink()
    assert heard(claim()) == "claimed"
    with pytest.raises(DirectoryInUseError):
        begin_in(tmp_path)
    # Rank 1 may sit on a machine from which one cannot see whether the last attempt is alive.
    monkeypatch.setenv("RANK", "1")
    begin_in(tmp_path)
