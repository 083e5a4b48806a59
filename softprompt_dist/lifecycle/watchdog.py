"""A rank that hangs ends itself, and says where it hung.

A collective that one rank never reaches keeps the others waiting for as long as the library allows,
hours with NCCL, while the cluster's time runs. So each rank watches itself: whoever makes no
progress for too long writes the stacks of all its threads to the run directory and ends. The others
wait for it and are watched the same: those that had to wait for as long leave their stacks, too.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.errors import HangError
from softprompt_dist.outcome_files import record_failure
from softprompt_dist.progress import phase

_POLL_SECONDS = 0.2
_OTHERS_SECONDS = 1.0
"""For the other ranks, who notice at about the same time, to write their stacks too."""
_DISK_SECONDS = 2.0
"""To write in: a disk that hangs may be the reason."""
_SUSPENDED_SECONDS = 2.0
"""Without a look at the clock: this process was halted (`scontrol suspend`), which is no hang."""


@dataclass
class _Clock:
    """What the main thread does, and since when."""

    doing: str = ""
    limit_seconds: float = 0.0
    since: float = 0.0


_clock = _Clock()


def tick() -> None:
    """This rank has made progress. No collective; costs nothing where nobody watches."""
    _clock.since = time.monotonic()


@contextmanager
def doing(what: str, limit_seconds: float) -> Iterator[None]:
    """Watch over a phase in which `limit_seconds` without a `tick` mean that this rank hangs."""
    before = (_clock.doing, _clock.limit_seconds)
    tick()  # first: what came before may be silent for longer than this phase may
    _clock.doing, _clock.limit_seconds = what, limit_seconds
    try:
        with phase(what):
            yield
    finally:
        tick()
        _clock.doing, _clock.limit_seconds = before


def current() -> dict[str, Any]:
    """What this rank is doing, for how long without progress, and for how long it may."""
    return {
        "doing": _clock.doing,
        "silent_seconds": round(time.monotonic() - _clock.since, 1),
        "limit_seconds": _clock.limit_seconds,
    }


class Watchdog:
    """A thread that looks at the clock; `stacks` is the folder for what it finds."""

    def __init__(self, stacks: Path) -> None:
        from softprompt_dist.parallel import ranks  # here: torch is slow to import

        self._rank, self._stacks = ranks.rank(), stacks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        tick()
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(_POLL_SECONDS):
            asleep, looked = time.monotonic() - looked, time.monotonic()
            if asleep > _SUSPENDED_SECONDS:
                _clock.since += asleep
            limit, silent = _clock.limit_seconds, time.monotonic() - _clock.since
            if limit and silent > limit:
                self._bite(_clock.doing, limit)

    def _bite(self, what: str, limit: float) -> None:
        error = HangError(
            f"Rank {self._rank} made no progress for {limit:g} s while {what}. Stacks: "
            f"{self._stacks}. If that is no hang, raise health.step_timeout_seconds or "
            "health.slow_timeout_seconds."
        )
        writer = threading.Thread(target=self._leave_word, args=(error,), daemon=True)
        writer.start()
        writer.join(_DISK_SECONDS)
        print(f"[rank {self._rank}] error: {error}", file=sys.stderr, flush=True)
        time.sleep(_OTHERS_SECONDS)
        os._exit(error.exit_code)

    def _leave_word(self, error: HangError) -> None:
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._rank}.txt").open("w") as file:
                file.write(f"{time.strftime('%F %T')} {error}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        record_failure(error)
