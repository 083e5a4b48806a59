"""In processes of their own, for whoever hangs is ended; all at a time, as they mostly sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

WATCHED = """
import sys, threading, time
from pathlib import Path
from softprompt_dist.lifecycle import watchdog
from softprompt_dist.lifecycle.watchdog import Watchdog, doing, tick
folder = Path(sys.argv[1])
dog = Watchdog(folder / "stacks")
dog.start()
def stand_still():
    time.sleep(60)
"""
HANGS = """
with doing("step 7", 1.0):
    threading.Thread(target=stand_still, daemon=True).start()
    (folder / "hangs").touch()
    stand_still()
"""
RECORDED = """
import torch._C._distributed_c10d as c10d
c10d._dump_nccl_trace = lambda: b"what NCCL was doing"
"""
RECORDER_HANGS = """
import torch._C._distributed_c10d as c10d
c10d._dump_nccl_trace = stand_still
"""
RECORDER_FAILS = """
import torch._C._distributed_c10d as c10d
def _fail():
    raise RuntimeError("no recorder")
c10d._dump_nccl_trace = _fail
sys.stderr.close()
"""
PRINTS_STACKS = """
dog.stop()
watchdog.Watchdog(None).start()
"""
SETTLES = """
with doing("scoring", 1.0, first_seconds=60.0):
    time.sleep(1.5)
    watchdog.settle()
    with doing("writing", 60.0):
        time.sleep(1.5)
    (folder / "hangs").touch()
    stand_still()
"""
GOES_ON = """
from types import SimpleNamespace
now, looks = [time.monotonic()], [0]
def shown():
    looks[0] += threading.current_thread() is dog._thread
    return now[0]
watchdog.time = SimpleNamespace(monotonic=shown, sleep=time.sleep, strftime=time.strftime)
watchdog._POLL_SECONDS = 0.001
def passes(seconds):
    for _ in range(round(seconds / 0.1)):
        now[0] += 0.1
        enough = looks[0] + 6  # two rounds of the watchdog
        while looks[0] < enough:
            time.sleep(0.001)
with doing("step 7", 1.0):
    for _ in range(5):
        passes(0.9)
        tick()
passes(1.5)  # outside of any phase
with doing("loading", 60.0):
    passes(1.5)
    with doing("step 8", 1.0):  # the silence before it is not its own
        passes(0.9)
with doing("step 9", 1.0):
    with doing("saving", 60.0):
        passes(1.5)
    passes(0.9)
dog.stop()
with doing("step 10", 0.1):
    now[0] += 0.5
print("went on", flush=True)
"""
IS_HALTED = """
watchdog._SUSPENDED_SECONDS = 0.5
with doing("step 7", 1.5):
    (folder / "halt").touch()
    for _ in range(25):
        time.sleep(0.1)
        tick()
print("went on", flush=True)
"""
SETTINGS = {"ascii": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}


@dataclass(frozen=True)
class Watched:
    """A process with a watchdog, which leaves in `folder` what it leaves."""

    folder: Path
    process: subprocess.Popen[str]

    def until(self, name: str) -> None:
        deadline = time.monotonic() + 240
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def outcome(self) -> tuple[int, str, str]:
        said, err = self.process.communicate(timeout=240)
        return self.process.returncode, said, err


@pytest.fixture(scope="module")
def all_watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Watched]]:
    codes = {"hangs": HANGS, "dead disk": HANGS, "goes on": GOES_ON, "is halted": IS_HALTED}
    codes |= {"recorded": RECORDED + HANGS, "recorder hangs": RECORDER_HANGS + HANGS}
    codes |= {"recorder fails": RECORDER_FAILS + HANGS, "settles": SETTLES}
    codes |= {"prints": PRINTS_STACKS + HANGS, "ascii": HANGS.replace("step 7", r"step \u2116 7")}
    folders = {name: tmp_path_factory.mktemp("watched") for name in codes}
    # To open it for writing waits for a reader, as a dead disk does for ever.
    os.mkfifo(folders["dead disk"] / "fifo")
    (folders["dead disk"] / "stacks").mkdir()
    (folders["dead disk"] / "stacks" / "rank-3.txt").symlink_to(folders["dead disk"] / "fifo")
    started = {
        name: Watched(folders[name], start(code, folders[name], SETTINGS.get(name, {})))
        for name, code in codes.items()
    }
    yield started
    for watched in started.values():
        watched.process.kill()
        watched.process.communicate()


def start(code: str, folder: Path, settings: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED + code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SOFTPROMPT_OUTCOME": str(folder), "RANK": "3"} | settings,
    )


def test_a_process_that_was_halted_does_not_hang(all_watched: dict[str, Watched]) -> None:
    watched = all_watched["is halted"]
    watched.until("halt")
    watched.process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)  # longer than it may be silent
    watched.process.send_signal(signal.SIGCONT)
    assert watched.outcome()[:2] == (0, "went on\n")
    assert [path.name for path in watched.folder.iterdir()] == ["halt"]


def test_a_rank_that_hangs_ends_with_the_stacks_of_all_its_threads(
    all_watched: dict[str, Watched],
) -> None:
    watched = all_watched["hangs"]
    watched.until("hangs")
    code, _, err = watched.outcome()
    ended = watched.folder / "why"
    assert ended.stat().st_mtime - (watched.folder / "hangs").stat().st_mtime < 1.0 + 5
    assert code == 5
    message = "Rank 3 made no progress for 1 s while step 7. Stacks: "
    assert f"[rank 3] error: {message}" in err
    assert "health.step_timeout_seconds" in err
    stacks = (watched.folder / "stacks" / "rank-3.txt").read_text()
    assert message in stacks
    assert stacks.count(" in stand_still") == 2
    assert ended.read_text().startswith(f"hang: {message}")


def test_a_disk_that_hangs_keeps_no_rank_from_ending(all_watched: dict[str, Watched]) -> None:
    code, _, err = all_watched["dead disk"].outcome()
    assert code == 5
    assert "made no progress" in err


def test_progress_of_any_kind_is_no_hang(all_watched: dict[str, Watched]) -> None:
    watched = all_watched["goes on"]
    code, said, err = watched.outcome()
    assert (code, said) == (0, "went on\n"), err
    assert list(watched.folder.iterdir()) == []


def test_what_nccl_was_doing_lies_beside_the_stacks(all_watched: dict[str, Watched]) -> None:
    watched = all_watched["recorded"]
    assert watched.outcome()[0] == 5
    assert (watched.folder / "stacks" / "nccl-rank-3").read_bytes() == b"what NCCL was doing"


@pytest.mark.parametrize("case", ["recorder hangs", "recorder fails"])
def test_a_recorder_that_hangs_or_fails_keeps_no_rank_from_ending(
    all_watched: dict[str, Watched], case: str
) -> None:
    watched = all_watched[case]
    watched.until("hangs")
    code, _, err = watched.outcome()
    assert code == 5
    ended = watched.folder / "why"
    assert ended.read_text().startswith("hang: Rank 3 made no progress for 1 s while step 7.")
    assert ("made no progress" in err) == (case == "recorder hangs"), "the other has no stderr"
    assert "Traceback" not in err


def test_what_is_done_for_the_first_time_may_take_longer(all_watched: dict[str, Watched]) -> None:
    watched = all_watched["settles"]
    watched.until("hangs")
    code, _, err = watched.outcome()
    assert code == 5
    assert "made no progress for 1 s while scoring." in err


def test_without_a_folder_the_stacks_are_printed(all_watched: dict[str, Watched]) -> None:
    code, _, err = all_watched["prints"].outcome()
    assert code == 5
    assert err.count(" in stand_still") == 2


def test_a_locale_that_lacks_a_character_hides_no_hang(all_watched: dict[str, Watched]) -> None:
    watched = all_watched["ascii"]
    assert watched.outcome()[0] == 5
    said = (watched.folder / "stacks" / "rank-3.txt").read_text(encoding="utf-8")
    assert "made no progress for 1 s while step \u2116 7." in said
    assert (watched.folder / "why").read_text().startswith("hang: ")
