"""heartbeat.json: whether a run is alive, and how far it is; rank 0 rewrites it every few seconds.

A thread writes it, also while a step takes long: a run that hangs has a heart that beats and a step
that stands still, one that was killed has no heart.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprompt_dist.durable import replace_file
from softprompt_dist.lifecycle import watchdog

log = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
_LAST_SECONDS = 30.0
"""For a beat under way: a disk that hangs must not keep a run from ending."""


class Heartbeat:
    """Writes `facts`, which never change, and the latest values, into `folder`.

    Unless `is_ours()`, another attempt's heart beats there, and this one's no longer.
    """

    def __init__(
        self,
        folder: Path,
        every_seconds: float,
        facts: dict[str, Any],
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self._path, self._every_seconds = folder / HEARTBEAT, every_seconds
        self._facts = {**facts, "heartbeat_seconds": every_seconds}
        self._values = dict[str, Any]()
        self._is_ours = is_ours
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._has_warned = False

    def start(self) -> None:
        """Write the first, and go on."""
        self._write()
        self._thread.start()

    def note(self, **values: Any) -> None:
        """What the next beats say, besides what they said; `step` is progress."""
        if "step" in values:
            values["step_time"] = time.time()
        self._values |= values

    def stop(self, *, last_beat: bool) -> None:
        """Beat no longer; the last beat says that the attempt has ended."""
        self._ended.set()
        self._thread.join(_LAST_SECONDS)
        if last_beat:
            self._values["ended"] = True
            self._write()

    def _beat(self) -> None:
        while not self._ended.wait(self._every_seconds):
            self._write()

    def _write(self) -> None:
        if not self._is_ours():
            return
        values = {**self._facts, **self._values, **watchdog.current(), "time": time.time()}
        try:
            content = json.dumps(values, indent=1).encode()
            replace_file(self._path, content, flush=False, is_patient=False)
        except OSError as error:
            if not self._has_warned:
                log.warning("No heartbeat can be written: %s", error)
            self._has_warned = True
