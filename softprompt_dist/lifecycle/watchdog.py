"""A rank that hangs ends itself, and says where it hung.

A collective that one rank never reaches keeps the others waiting for as long as the library allows,
hours with NCCL, while the cluster's time runs. So each rank watches itself: whoever makes no
progress for too long writes the stacks of all its threads to the run directory and ends. The others
wait for it and are watched the same, so the stacks of all ranks are there.
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

from softprompt_dist.errors import HangError
from softprompt_dist.outcome_files import record_failure
from softprompt_dist.parallel import ranks

_POLL_SECONDS = 0.2
_OTHERS_SECONDS = 1.0
"""For the other ranks, who notice at about the same time, to write their stacks too."""


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
    _clock.doing, _clock.limit_seconds = what, limit_seconds
    tick()
    try:
        yield
    finally:
        _clock.doing, _clock.limit_seconds = before
        tick()


def current() -> str:
    """What this rank is doing."""
    return _clock.doing


class Watchdog:
    """A thread that looks at the clock; `stacks` is the folder for what it finds."""

    def __init__(self, stacks: Path) -> None:
        self._stacks = stacks
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
        while not self._ended.wait(_POLL_SECONDS):
            limit, silent = _clock.limit_seconds, time.monotonic() - _clock.since
            if limit and silent > limit:
                self._bite(_clock.doing, limit)

    def _bite(self, what: str, limit: float) -> None:
        place = self._stacks / f"rank-{ranks.rank()}.txt"
        with suppress(OSError):  # a disk that hangs may be the reason
            self._stacks.mkdir(parents=True, exist_ok=True)
            with place.open("w") as file:
                file.write(f"rank {ranks.rank()}: no progress for {limit:g} s while {what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        error = HangError(
            f"Rank {ranks.rank()} made no progress for {limit:g} s while {what}. Stacks of all "
            f"ranks: {self._stacks}. If that is no hang, raise health.step_timeout_seconds or "
            "health.slow_timeout_seconds."
        )
        record_failure(error)
        print(f"[rank {ranks.rank()}] error: {error}", file=sys.stderr, flush=True)
        time.sleep(_OTHERS_SECONDS)
        os._exit(error.exit_code)
