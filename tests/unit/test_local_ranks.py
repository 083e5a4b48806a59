"""Ranks that the doctor starts itself, and how it tells what became of them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from softprompt_dist.checks.local_ranks import rank_variables, run_local_ranks
from softprompt_dist.errors import MachineError

REMEMBER_PID = (
    "import os, sys, time\nopen(f'{os.environ[\"RANK\"]}.pid', 'w').write(str(os.getpid()))\n"
)


def run(code: str, folder: Path, timeout_seconds: float = 60) -> None:
    run_local_ranks(
        [sys.executable, "-c", REMEMBER_PID + code],
        2,
        logs=folder,
        timeout_seconds=timeout_seconds,
    )


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_rank_gets_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    assert rank_variables(1, 3, 1234)["OMP_NUM_THREADS"] == "2"
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    run(f"print(*(os.environ[n] for n in {names}))", tmp_path)
    first, second = (tmp_path / f"rank{rank}" for rank in range(2))
    ranks = [file.read_text().split() for file in (first, second)]
    assert [r[:4] for r in ranks] == [[n, n, "2", "127.0.0.1"] for n in ("0", "1")]
    assert ranks[0][4] == ranks[1][4]


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ("sys.exit('error: no network')", "^no network$"),
        ("raise ValueError('odd')", "^Rank 1 ended with exit code 1: ValueError: odd$"),
        ("os.kill(os.getpid(), 9)", "^Rank 1 was killed by SIGKILL"),
    ],
)
def test_the_rank_that_ends_early_speaks_and_the_other_is_ended(
    ends: str, told: str, tmp_path: Path
) -> None:
    code = f"if os.environ['RANK'] == '0':\n    time.sleep(60)\n{ends}"
    start = time.monotonic()
    with pytest.raises(MachineError, match=told):
        run(code, tmp_path)
    assert time.monotonic() - start < 50, "it waited for the rank that sleeps"
    assert not is_running(int((tmp_path / "0.pid").read_text()))


def test_a_hang_ends_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "open(f'{child.pid}.child', 'w').close()\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(MachineError, match=r"did not answer within 3 s\..*--timeout"):
        run(code, tmp_path, timeout_seconds=3)
    started = [*tmp_path.glob("*.child")]
    assert len(started) == 2
    deadline = time.monotonic() + 10
    while any(is_alive(int(path.stem)) for path in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(int(path.stem)) for path in started)


def is_alive(pid: int) -> bool:
    """Orphans that have ended may wait for init to take note."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
