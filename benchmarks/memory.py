"""What this process holds in RAM, in bytes."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_POLL_SECONDS = 0.02


def resident_bytes(field: str = "VmRSS") -> int:
    """A field of /proc/self/status.

    `VmRSS`: now, mapped files included; `VmHWM`: its peak since `reset_peak`; `RssAnon`: now,
    without mapped files. Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Let `VmHWM` start again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class PeakMemory:
    """Peak of what the process holds while in the `with` block.

    Attributes:
        resident_bytes: with mapped files, exactly (kept by the kernel).
        anonymous_bytes: without mapped files, which the kernel can drop; looked at every 20 ms.
        resident_before: with mapped files, at the start.
    """

    def __init__(self) -> None:
        self.resident_before = 0
        self.resident_bytes = 0
        self.anonymous_bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        """Itself, watching."""
        self.resident_before = resident_bytes()
        reset_peak()
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self._done.set()
        self._watcher.join()
        self.resident_bytes = resident_bytes("VmHWM")

    def _watch(self) -> None:
        while True:
            self.anonymous_bytes = max(self.anonymous_bytes, resident_bytes("RssAnon"))
            if self._done.wait(_POLL_SECONDS):
                return
