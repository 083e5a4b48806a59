"""Stopping when asked to: SIGTERM, SIGUSR1 and SIGUSR2 to any rank mean "save and end".

Slurm sends one of them before a time limit, a preemption or a cancellation, sometimes to the ranks,
sometimes to the batch script, which passes it on. A handler does nothing but set a flag: what it
interrupts may be a save or a collective. The ranks then agree at a boundary that all of them reach.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from softprompt_dist.errors import HangError, StoppedError
from softprompt_dist.outcome_files import record_failure

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_received: list[int] = []


def listen() -> None:
    """From now on remember the signals instead of dying of them. Again: nothing changes.

    To be called before anything that starts threads or processes, as they inherit what is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python allows handlers there alone; a test may run a verb elsewhere
    for number in SIGNALS:
        signal.signal(number, _remember)


def forget() -> None:
    """Let the signals do what they do by default, and forget those that came."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def wanted() -> int:
    """The first signal that this rank was sent; 0 for none."""
    return _received[0] if _received else 0


def agreed() -> int:
    """All ranks: a signal that any of them was sent; 0 for none."""
    import torch

    from softprompt_dist.parallel import ranks

    return int(ranks.all_reduce_max(torch.tensor(wanted(), device=ranks.device())))


def end_here_if_asked(doing: str) -> None:
    """All ranks: end a phase in which there is nothing to save.

    Raises:
        StoppedError: on all ranks, if any of them was sent a signal.
    """
    number = agreed()
    if number:
        raise StoppedError(f"{name_of(number)} while {doing}. The same command begins again there.")


def name_of(number: int) -> str:
    """SIGTERM and its like."""
    return signal.Signals(number).name


def ignore_in_child() -> None:
    """In a worker process: Slurm signals every process of a step, and this one has a parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ends_while_waiting(limit_seconds: float, late: str) -> Iterator[None]:
    """A wait that other ranks alone can end, such as the first meeting.

    There is nothing to save yet, and no boundary that would be reached: a signal ends the process,
    and so do `limit_seconds` without an end, with the message `late`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # The wait is C++'s, during which no handler of Python runs: C's writes the number down at once.
    heard, hear = os.pipe()
    os.set_blocking(hear, False)
    earlier = signal.set_wakeup_fd(hear, warn_on_full_buffer=False)
    hang = HangError(late)
    waiting = threading.Thread(target=_end_wait, args=(heard, limit_seconds, hang), daemon=True)
    waiting.start()
    try:
        if wanted():
            os.write(hear, bytes([wanted()]))
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.write(hear, b"\0")
        waiting.join()
        os.close(hear)
        os.close(heard)


def _end_wait(heard: int, limit_seconds: float, hang: HangError) -> None:
    # Not `sys.stdout`: what libraries print while they wait is kept from people.
    while select.select([heard], [], [], limit_seconds)[0]:
        number = os.read(heard, 1)[0]
        if not number:
            return
        if number in SIGNALS:
            failure = StoppedError(f"{name_of(number)} before the ranks met.")
            record_failure(failure)
            with suppress(OSError):
                print(f"Stopped: {failure}", file=sys.__stdout__, flush=True)
            os._exit(failure.exit_code)
    end_hung(hang)


def end_hung(hang: HangError) -> NoReturn:
    """End this process, whatever its main thread waits for."""
    record_failure(hang)
    with suppress(OSError):
        print(f"error: {hang}", file=sys.__stderr__, flush=True)
    os._exit(hang.exit_code)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)
