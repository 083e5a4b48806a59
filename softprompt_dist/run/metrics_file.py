"""metrics.jsonl: one JSON object a line, `step`, `kind` and `time`, then the metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from softprompt_dist.durable import cut_file, replace_file
from softprompt_dist.lifecycle.spikes import SPIKE


class MetricsFile:
    """The metrics of one run, in which every pair of step and kind occurs once.

    Opened at step s > 0 it forgets what an earlier attempt logged after s; at 0 it forgets all. So
    the file of a resumed run is that of an uninterrupted one.

    Raises:
        OSError: the file cannot be read or written; also in `append` and `write_waiting`.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self._waiting: list[Mapping[str, Any]] = []
        kept = [line for line in read_metrics(path) if 0 < start_step >= line["step"]]
        self._earlier = {_key(line) for line in kept}
        self._rewrite(kept)

    def append(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Add a line; one of the same step and kind from an earlier attempt gives way.

        What a disk did not take is written with the next line that it takes.
        """
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **metrics}
        self._waiting.append(line)
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write what a disk has not taken so far, if there is anything."""
        if not self._waiting:
            return
        again = self._earlier.intersection(map(_key, self._waiting))
        if again:
            self._rewrite(other for other in read_metrics(self._path) if _key(other) not in again)
            self._earlier -= again
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_text(self._waiting))
        except OSError:
            with suppress(OSError):
                cut_file(self._path, size)  # a part of a line would spoil the next one
            raise
        self._waiting.clear()

    def _rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        replace_file(self._path, _text(lines).encode(), is_patient=False)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines in order; a line torn by a kill is left out, a missing file is empty."""
    path = Path(path)
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [line for line in map(_parse, texts) if line is not None]


def points(
    lines: Sequence[Mapping[str, Any]], kind: str, name: str
) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, from the lines of `read_metrics` that have it."""
    chosen = [line for line in lines if line["kind"] == kind and name in line]
    return [line["step"] for line in chosen], [line[name] for line in chosen]


def loss_history(path: Path, count: int) -> tuple[list[float], list[int]]:
    """The latest train losses that were not flagged as spikes, and the steps of all that were."""
    lines = read_metrics(path)
    usual = [line for line in lines if SPIKE not in line]
    return points(usual, "train", "loss")[1][-count:], points(lines, "train", SPIKE)[0]


def _text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line
    return line if is_ours else None


def _key(line: Mapping[str, Any]) -> tuple[int, str]:
    return line["step"], line["kind"]
