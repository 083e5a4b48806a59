"""How far work is that takes long: a bar on a terminal, elsewhere a line every few seconds.

Phases nest, and the innermost is told about. A thread speaks for one that does not advance. Only
rank 0 speaks, on stderr; there is no collective here, and a stderr that is closed ends nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")

LINE_SECONDS = 5.0
"""Between two lines of work that advances."""
_SILENT_SECONDS = 8.0
"""After which a line comes though nothing advances."""
_POLL_SECONDS = 0.5
_BAR_DELAY_SECONDS = 1.0
"""Work that takes less has no bar."""
_MINUTE = 60.0
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class Phase:
    """A piece of work: `done` of `total` units, or without a total the time that it takes."""

    def __init__(self, what: str, total: float | None, unit: str, done: float) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._done_before = done
        self.note = ""
        self.started = monotonic()
        self.is_open = False
        self.done_when_told: float | None = None
        self.bar: Any = None
        # Another library may have its own in place of this one for a while.
        self.stream = sys.stderr
        self.is_on_terminal = is_terminal(self.stream)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """So many units more are done; `note` says what else there is to say."""
        self.done += amount
        self.note = note
        _speaker.tell(self, LINE_SECONDS)

    def line(self) -> str:
        """Such as `scoring untuned: 120/600 rows, 1.9 s left`."""
        seconds, parts = monotonic() - self.started, []
        if self.total is not None or self.done:
            parts.append(_amount(self.done, self.total, self.unit))
        if self.note:
            parts.append(self.note)
        done_here = self.done - self._done_before
        if self.total is not None and done_here > 0 and self.done < self.total:
            parts.append(f"{_duration(seconds / done_here * (self.total - self.done))} left")
        else:
            parts.append(f"{_duration(seconds)} so far")
        return f"{self.what}: {', '.join(parts)}"


@contextmanager
def phase(
    what: str, total: float | None = None, unit: str = "", done: float = 0
) -> Iterator[Phase]:
    """Tell of a piece of work until the block ends. No collective.

    Args:
        what: is done, such as "loading weights".
        total: of the units that will be done; None where nobody knows.
        unit: in the plural, or "B" for bytes.
        done: of the total, before this block.
    """
    opened = Phase(what, total, unit, done)
    _speaker.open(opened)
    try:
        yield opened
    finally:
        _speaker.close(opened)


def counted(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """The items, telling how many of them are done."""
    with phase(what, len(items), unit) as told:
        for item in items:
            yield item
            told.advance()


def is_terminal(stream: Any) -> bool:
    """Whether a bar can be drawn there; one without a size, as some programs make, shows none."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(stream.isatty()) and _num_lines(stream) != 0
    return False


def _num_lines(stream: Any) -> int | None:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).lines
    return None


def spoke() -> None:
    """Something else was said on the screen: no line is due yet."""
    _speaker.spoke()


class _Speaker:
    """All open phases of this process, and when it was last heard."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._phases: list[Phase] = []
        self._spoke_at = monotonic()
        self._thread: threading.Thread | None = None

    def open(self, opened: Phase) -> None:
        """Tell of a phase from now on, if this is rank 0."""
        if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0":
            return
        with self._lock:
            self._erase_clocks()
            self._phases.append(opened)
            opened.is_open = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
                self._thread.start()

    def close(self, closed: Phase) -> None:
        """Tell of a phase no longer; one line more, if there were any."""
        with self._lock:
            if closed.is_open:
                self._phases.remove(closed)
                closed.is_open = False
                _close_bar(closed)
                if closed.total is not None and closed.done_when_told not in (None, closed.done):
                    self._say(closed)

    def tell(self, told: Phase, patience_seconds: float) -> None:
        """Move the phase's bar; or print a line if there was none for so long."""
        with self._lock:
            if not told.is_open:
                return
            is_silent = monotonic() - self._spoke_at >= patience_seconds
            if told.is_on_terminal:
                if is_silent or told.total is not None:
                    self._spoke_at = monotonic()
                    _move_bar(told, redraw=is_silent)
            elif is_silent:
                self._say(told)

    def break_silence(self) -> None:
        """Tell of the innermost phase if nothing was heard for some seconds."""
        with self._lock:
            if self._phases:
                self.tell(self._phases[-1], _SILENT_SECONDS)

    def spoke(self) -> None:
        """See the function."""
        with self._lock:
            self._spoke_at = monotonic()
            self._erase_clocks()

    def _erase_clocks(self) -> None:
        for each in self._phases:
            if each.total is None:
                _close_bar(each)

    def _say(self, told: Phase) -> None:
        self._spoke_at = monotonic()
        told.done_when_told = told.done
        with suppress(OSError, ValueError, AttributeError):  # closed, or there never was one
            told.stream.write(f"{told.line()}\n")
            told.stream.flush()

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            self.break_silence()


_speaker = _Speaker()


def _move_bar(told: Phase, *, redraw: bool) -> None:
    from tqdm import tqdm

    with suppress(OSError, ValueError):
        if told.bar is None:
            is_counted = told.total is not None
            told.bar = tqdm(
                total=told.total,
                initial=told.done,
                desc=told.what,
                unit=told.unit if told.unit == "B" else f" {told.unit}",
                unit_scale=told.unit == "B",
                file=told.stream,
                leave=False,
                dynamic_ncols=True,
                delay=_BAR_DELAY_SECONDS,
                bar_format=None if is_counted else "{desc}: {elapsed}{postfix}",
            )
            told.bar.start_t -= monotonic() - told.started
        told.bar.set_postfix_str(told.note, refresh=False)
        told.bar.update(told.done - told.bar.n)
        if redraw:
            told.bar.refresh()


def _close_bar(told: Phase) -> None:
    if told.bar is not None:
        with suppress(OSError, ValueError):
            told.bar.close()
        told.bar = None


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "B":
        power = 0
        while max(done, total or 0) >= 1000 ** (power + 1) and power + 1 < len(_BYTE_UNITS):
            power += 1
        digits, unit = (2 if power else 0), _BYTE_UNITS[power]
        done, total = done / 1000**power, None if total is None else total / 1000**power
    else:
        digits = 0
    of_total = "" if total is None else f"/{total:.{digits}f}"
    return f"{done:.{digits}f}{of_total} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 2 * _MINUTE:
        return f"{seconds:.{int(seconds < _MINUTE / 6)}f} s"
    if seconds < 120 * _MINUTE:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / (60 * _MINUTE):.1f} h"
