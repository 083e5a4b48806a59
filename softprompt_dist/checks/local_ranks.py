"""Ranks on this machine without a launcher: started, waited for, and none left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.checks.communication import unanswered
from softprompt_dist.checks.finding import Finding
from softprompt_dist.errors import MachineError

_POLL_SECONDS = 0.05
_MODULE = "softprompt_dist.checks.communication"


def check_local_communication(
    num_ranks: int, *, timeout_seconds: float, debug: bool
) -> list[Finding]:
    """The findings of `check_communication` on `num_ranks` processes of this machine."""
    with tempfile.TemporaryDirectory(prefix="softprompt-doctor-") as folder:
        findings = Path(folder) / "findings.json"
        # A rank whose doctor was killed ends itself, but not before the doctor would have.
        own_timeout = str(timeout_seconds + 10)
        command = [sys.executable, "-m", _MODULE, str(findings), "--timeout", own_timeout]
        try:
            run_local_ranks(
                command + ["--debug"] * debug,
                num_ranks,
                logs=Path(folder),
                timeout_seconds=timeout_seconds,
            )
        except MachineError as error:
            return [Finding("communication", "fail", f"{num_ranks} local ranks", str(error))]
        return [Finding(**values) for values in json.loads(findings.read_bytes())]


def run_local_ranks(
    command: Sequence[str], num_ranks: int, *, logs: Path, timeout_seconds: float
) -> None:
    """Run `command` once for each rank, to the end; whatever happens, no process is left.

    Raises:
        MachineError: a rank failed, with its last words; or not all ended in time.
    """
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            variables = rank_variables(rank, num_ranks, port)
            with (logs / f"rank{rank}").open("wb") as log:
                ranks.append(
                    # A session of its own: what it starts (a compiler) can be ended with it.
                    subprocess.Popen(
                        command,
                        env=os.environ | variables,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        _wait(ranks, logs, timeout_seconds)
    finally:
        for process in ranks:
            _end(process)


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What a launcher would set for one rank of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (cores or 1) // num_ranks))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
    }


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _wait(ranks: Sequence[subprocess.Popen[bytes]], logs: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            break
        if time.monotonic() > deadline:
            raise MachineError(unanswered(timeout_seconds))
        time.sleep(_POLL_SECONDS)
    for rank, process in enumerate(ranks):
        if process.poll():
            raise MachineError(_last_words(rank, process.returncode, logs / f"rank{rank}"))


def _last_words(rank: int, returncode: int, log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    message = text.rpartition("error: ")[2] or "It said nothing."
    if returncode < 0:
        ended = f"was killed by {signal.Signals(-returncode).name}"
        hint = " (SIGKILL: memory ran out? SIGBUS: /dev/shm is full?)"
        return f"Rank {rank} {ended}{hint}. {message.splitlines()[-1]}"
    if "error: " in text:
        return message
    return f"Rank {rank} ended with exit code {returncode}: {message.splitlines()[-1]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    # Its group may outlive it: a compiler that it started.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
