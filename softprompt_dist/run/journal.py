"""What a run says while it works: metrics.jsonl, TensorBoard, and a bar or lines for people."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from softprompt_dist.errors import MachineError
from softprompt_dist.lifecycle.beside import Beside
from softprompt_dist.parallel import ranks
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.display import TRAIN, Display, Formats, Silence, open_display
from softprompt_dist.run.metrics_file import MetricsFile

log = logging.getLogger(__name__)

_LAST_SECONDS = 30.0
"""For what is being written when a run ends: a disk that hangs must not keep it from that."""
_SECONDS_WITHOUT_EVENTS = 60.0
"""After an error of TensorBoard's writer, until there is another."""
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")
"""The number is the second in which it was opened."""
_LONGEST_WAIT_SECONDS = 2.0
"""For a later second than that of the files that are there; clocks further apart stay so."""


class Journal:
    """Numbers and words of a run that begins after `start_step` (0: from the beginning).

    All ranks make one; only rank 0's writes and prints. Use it as a context manager. `shown` picks
    the metrics of a train step that people see; all are written.

    Raises:
        MachineError: on all ranks, when its files cannot be written.
    """

    def __init__(
        self,
        directory: RunDirectory,
        total_steps: int,
        start_step: int = 0,
        shown: Formats | None = None,
    ) -> None:
        self._file: MetricsFile | None = None
        self._entries = deque[tuple[int, str, dict[str, float]]]()
        self._writer = Beside(self._write)
        self._events: Any = None
        self._events_from = 0.0
        self._display: Display = Silence()
        self._has_warned = self._is_ending = False
        ranks.on_main(lambda: self._open(directory, start_step))
        if self._file is not None:
            self._display = open_display(total_steps, shown)

    def __enter__(self) -> Journal:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it, whatever happened."""
        self.close()

    def log(self, step: int, metrics: Mapping[str, float], kind: str = TRAIN) -> None:
        """Record the metrics of a step; `kind`: "train", "validation" or "test". No collective."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._entries.append((step, kind, values))
        self._writer.run()
        self._display.show(step, kind, values)

    def passed(self, step: int) -> None:
        """Show how far the run is after a train step that is not recorded."""
        self._display.show(step, TRAIN, {})

    def say(self, text: str) -> None:
        """Print `text` for the person who watches; the progress bar stays whole."""
        self._display.say(text)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._file is None:
            return
        self._display.close()
        self._writer.wait(_LAST_SECONDS)
        self._is_ending = True
        self._writer.run(_LAST_SECONDS)
        self._file = None

    def _write(self) -> None:
        file = self._file
        while self._entries and file is not None:
            step, kind, values = self._entries.popleft()
            try:
                file.append(step, kind, values)
            except OSError as error:
                self._warn(f"the metrics of step {step} cannot be written yet: {error}")
            self._add_events(step, kind, values)
        if self._is_ending and file is not None:
            self._end(file)

    def _end(self, file: MetricsFile) -> None:
        try:
            file.write_waiting()
        except OSError as error:
            self._warn(f"the last metrics are lost: {error}")
        try:
            if self._events is not None:
                self._events.close()
        except OSError as error:
            self._warn(f"the last TensorBoard events are lost: {error}")

    def _add_events(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        if time.monotonic() < self._events_from:
            return
        try:
            if self._events is None:  # its writer does not outlive an error
                self._events = self._open_events()
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            self._events, self._events_from = None, time.monotonic() + _SECONDS_WITHOUT_EVENTS
            self._warn(f"the TensorBoard events of step {step} (at least) are lost: {error}")

    def _open(self, directory: RunDirectory, start_step: int) -> None:
        # Hides what an earlier attempt logged of the steps that come again.
        purge_step = start_step + 1 if start_step else 0
        try:
            self._file = MetricsFile(directory.metrics, start_step)
            self._open_events = partial(_summary_writer, str(directory.tensorboard))
            self._events = self._open_events(purge_step=purge_step)
        except OSError as error:
            raise MachineError(
                f"The run's metrics cannot be written: {error}. Pass --run-dir with a folder that "
                "you may write, or free space there."
            ) from error

    def _warn(self, message: str) -> None:
        # A full disk is no reason to stop here, on one rank: the next checkpoint stops all, whole.
        if not self._has_warned:
            log.warning("Journal: %s", message)
        self._has_warned = True


def _summary_writer(folder: str, **settings: Any) -> Any:
    # Imported here: it takes seconds, and only rank 0 writes events.
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard reads the files in the order of their names: this one's must be the last.
    opened = [int(match[1]) for p in Path(folder).glob("*") if (match := _EVENT_FILE.match(p.name))]
    early = max(opened, default=0) + 1 - time.time()
    time.sleep(min(max(0.0, early), _LONGEST_WAIT_SECONDS))
    return SummaryWriter(folder, **settings)
