"""How far gathers may run ahead of computing, and so how many gathered blocks a device holds.

A device works off what it is told behind the host's back. A freed block can be given again only
once the computation that reads it has ended, which the allocator asks at the next allocation: a
host that runs tens of blocks ahead would have the device hold them all.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

MAX_UNFINISHED = 1
"""Freed blocks whose computation may still run when the next one is gathered.

With one, the block in use is launched while the one before it computes, so the device never idles;
none would have it wait for the host at every block.
"""


class Event(Protocol):
    """A place in what a device works off."""

    def synchronize(self) -> None:
        """Wait, on the host, until the device has come to it."""


def compute_event() -> Event | None:
    """An event behind all computing launched so far; None where the host computes itself."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.is_synchronized_device():
        return None
    event: Event = accelerator.current_stream().record_event()
    return event


class GatherLimit:
    """Lets the host gather a block only when all freed blocks but the last have been computed."""

    def __init__(self) -> None:
        self._unfinished: deque[Event] = deque()

    def wait(self) -> None:
        """Before a gather: wait for all but the last `MAX_UNFINISHED` freed blocks.

        On the host: a stream that waits does not let the allocator have the memory any earlier.
        """
        while len(self._unfinished) > MAX_UNFINISHED:
            self._unfinished.popleft().synchronize()

    def note_release(self) -> None:
        """After a block was freed, and so behind the allocator's own event for its memory."""
        event = compute_event()
        if event is not None:
            self._unfinished.append(event)
