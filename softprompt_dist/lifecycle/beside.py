"""Work on a disk that may hang, beside the thread that asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

_SECONDS = 1.0
"""A disk that is well answers sooner; training waits for no other."""


class Beside:
    """`work`, in a thread of its own; it must cope with whatever it meets."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._thread = threading.Thread()

    def run(self, seconds: float | None = None) -> None:
        """Have it done, unless it is being done still, and wait for its end for no longer."""
        if not self._thread.is_alive():
            # A daemon: a disk that hangs keeps no process from ending.
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
            self._thread.join(_SECONDS if seconds is None else seconds)

    def wait(self, seconds: float) -> None:
        """For the end of what is being done, if anything is."""
        if self._thread.is_alive():
            self._thread.join(seconds)
