"""Long work of rank 0 alone, during which a signal to any rank is heard.

The others would wait in one collective until it is done, hours perhaps. Instead all ranks meet
every second, whenever the work calls `poll`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from softprompt_dist.errors import StoppedError
from softprompt_dist.parallel import ranks, stop

T = TypeVar("T")

_SECONDS = 1.0
"""Between two meetings."""


@dataclass
class _Listener:
    """Whom `poll` tells that the work goes on."""

    hear: Callable[[], None] | None = None


_listener = _Listener()


def poll() -> None:
    """In the middle of long work of one rank; costs nothing where nobody listens.

    Raises:
        StoppedError: where somebody listens, and a rank was sent a signal.
    """
    if _listener.hear is not None:
        _listener.hear()


def on_main(work: Callable[[], T], doing: str, tick: Callable[[], None]) -> T:
    """All ranks: `ranks.on_main`, which ends early when any rank is sent a signal.

    Args:
        work: calls `poll` now and then.
        doing: for the message.
        tick: called on all ranks at every meeting.

    Raises:
        StoppedError: on all ranks.
    """
    if not ranks.is_main():
        while _meet(is_working=False, tick=tick)[1]:
            pass
        return ranks.on_main(work)

    def heard_work() -> T:
        met = time.monotonic()

        def hear() -> None:
            nonlocal met
            if time.monotonic() - met >= _SECONDS:
                met = time.monotonic()
                _raise_if(_meet(is_working=True, tick=tick)[0], doing)

        try:
            with _heard_by(hear):
                return work()
        finally:
            _meet(is_working=False, tick=tick)

    return ranks.on_main(heard_work)


@contextmanager
def alone(doing: str) -> Iterator[None]:
    """Work that several ranks do, each for itself: `poll` hears this rank's own signals."""
    with _heard_by(lambda: _raise_if(stop.wanted(), doing)):
        yield


@contextmanager
def _heard_by(hear: Callable[[], None]) -> Iterator[None]:
    _listener.hear = hear
    try:
        yield
    finally:
        _listener.hear = None


def _meet(*, is_working: bool, tick: Callable[[], None]) -> tuple[int, bool]:
    """All ranks: a signal that any of them was sent, and whether rank 0 goes on working."""
    tick()
    found = torch.tensor([stop.wanted(), int(is_working)], device=ranks.device())
    number, goes_on = ranks.all_reduce_max(found).tolist()
    return number, bool(goes_on)


def _raise_if(number: int, doing: str) -> None:
    if number:
        raise StoppedError(
            f"{stop.name_of(number)} while {doing}. The same command begins again there."
        )
