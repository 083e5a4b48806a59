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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.errors import HangError
from softprompt_dist.lifecycle.beside import Beside
from softprompt_dist.outcome_files import record_failure
from softprompt_dist.progress import phase
from softprompt_dist.section import HealthConfig

_POLL_SECONDS = 0.2
_OTHERS_SECONDS = 1.0
"""For the other ranks, who notice at about the same time, to write their stacks too."""
_DISK_SECONDS = 2.0
"""For each thing that is left: a disk that hangs may be the reason."""
_SUSPENDED_SECONDS = 2.0
"""Without a look at the clock: this process was halted (`scontrol suspend`), which is no hang."""


@dataclass
class _Clock:
    """What the main thread does, and since when."""

    doing: str = ""
    limit_seconds: float = 0.0
    since: float = 0.0
    settled_seconds: float = 0.0
    """The limit once what is done for the first time is done."""


_clock = _Clock()


def tick() -> None:
    """This rank has made progress. No collective; costs nothing where nobody watches."""
    _clock.since = time.monotonic()


def settle() -> None:
    """What this phase does for the first time is done."""
    tick()
    _clock.limit_seconds = _clock.settled_seconds


@contextmanager
def doing(what: str, limit_seconds: float, *, first_seconds: float | None = None) -> Iterator[None]:
    """Watch over a phase in which `limit_seconds` without a `tick` mean that this rank hangs.

    `first_seconds` is its limit until it calls `settle`: much is done for the first time.
    """
    before = (_clock.doing, _clock.limit_seconds, _clock.settled_seconds)
    tick()  # first: what came before may be silent for longer than this phase may
    _clock.doing, _clock.settled_seconds = what, limit_seconds
    _clock.limit_seconds = limit_seconds if first_seconds is None else first_seconds
    try:
        with phase(what):
            yield
    finally:
        tick()
        _clock.doing, _clock.limit_seconds, _clock.settled_seconds = before


def current() -> dict[str, Any]:
    """What this rank is doing, for how long without progress, and for how long it may."""
    return {
        "doing": _clock.doing,
        "silent_seconds": round(time.monotonic() - _clock.since, 1),
        "limit_seconds": _clock.limit_seconds,
    }


@contextmanager
def watched(stacks: Path | None, health: HealthConfig) -> Iterator[None]:
    """All ranks: the work of a verb that makes no attempt; `stacks` as for `Watchdog`."""
    dog = Watchdog(stacks)
    dog.start()
    try:
        with doing("between phases", health.slow_timeout_seconds):
            yield
    finally:
        dog.stop()


class Watchdog:
    """A thread that looks at the clock.

    `stacks` is the folder for what it finds; None: that is printed.
    """

    def __init__(self, stacks: Path | None) -> None:
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
            f"{self._stacks or 'above'}. If that is no hang, raise health.step_timeout_seconds or "
            "health.slow_timeout_seconds."
        )
        said = f"[rank {self._rank}] error: {error}"
        _within(_DISK_SECONDS, lambda: self._leave_word(error))
        _within(_DISK_SECONDS, self._leave_trace)
        _within(_DISK_SECONDS, lambda: print(said, file=sys.stderr, flush=True))
        time.sleep(_OTHERS_SECONDS)
        os._exit(error.exit_code)

    def _leave_word(self, error: HangError) -> None:
        with suppress(OSError):
            self._leave_stacks(f"{time.strftime('%F %T')} {error}\n")
        record_failure(error)

    def _leave_stacks(self, heading: str) -> None:
        if self._stacks is None:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return
        self._stacks.mkdir(parents=True, exist_ok=True)
        path = self._stacks / f"rank-{self._rank}.txt"
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(heading)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _leave_trace(self) -> None:
        """What NCCL was doing, by its flight recorder; `torchfrtrace` reads it."""
        c10d = sys.modules.get("torch._C._distributed_c10d")
        dump = getattr(c10d, "_dump_nccl_trace", None)  # of PyTorch with NCCL
        if self._stacks is not None and dump is not None:
            (self._stacks / f"nccl-rank-{self._rank}").write_bytes(dump())


def _within(seconds: float, work: Callable[[], object]) -> None:
    """`work`, whatever it meets, and for no longer: a disk, a pipe or NCCL may hang, too."""

    def attempt() -> None:
        with suppress(Exception):
            work()

    Beside(attempt).run(seconds)
