"""What a run's attempts have left on the disk, read without torch and without reading gigabytes."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.lifecycle.spikes import SPIKE

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_TAIL_BYTES = 64 * 2**10
_LONGEST_NUMBER = 20


@dataclass(frozen=True)
class CheckpointTrace:
    """A published checkpoint."""

    step: int
    age_seconds: float
    is_whole: bool
    """All files of its manifest are there, as long as they must be; their content is not read."""


@dataclass(frozen=True)
class MetricsTrace:
    """Of metrics.jsonl."""

    step: int | None = None
    """The last that was logged."""
    loss: float | None = None
    seconds_per_step: float | None = None
    """Of the latest steps, with all that was done between them."""
    spikes: int = 0
    """Among the latest steps."""
    last_spike_step: int | None = None


def newest_checkpoint(folder: Path) -> CheckpointTrace | None:
    """The published one of the highest step; None where there is none."""
    try:
        named = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()]
        step, path = max((int(match[1]), path) for match, path in named if match)
    except (OSError, ValueError):
        return None
    try:
        age = time.time() - (path / _MANIFEST).stat().st_mtime
        return CheckpointTrace(step, round(max(0.0, age), 1), _is_whole(path))
    except OSError:
        return CheckpointTrace(step, 0.0, is_whole=False)


def number_of_attempts(environment: Path) -> int:
    """Those that have come as far as loading the model."""
    attempts = read_object(environment).get("attempts")
    return len(attempts) if isinstance(attempts, list) else 0


def tail_of_metrics(path: Path) -> MetricsTrace:
    """What the end of the file tells: of how many steps, depends on the metrics of each."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = [_parsed(line) for line in file.read().splitlines()]
    except OSError:
        return MetricsTrace()
    train = [line for line in lines if line.get("kind") == "train" and _has_numbers(line)]
    if not train:
        return MetricsTrace()
    first, last = train[0], train[-1]
    steps = last["step"] - first["step"]
    flagged = [line["step"] for line in train if SPIKE in line]
    return MetricsTrace(
        step=last["step"],
        loss=last.get("loss"),
        seconds_per_step=(last["time"] - first["time"]) / steps if steps > 0 else None,
        spikes=len(flagged),
        last_spike_step=flagged[-1] if flagged else None,
    )


def read_object(path: Path) -> Mapping[str, Any]:
    """A small JSON file's; empty where there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes(), parse_int=_number)
        if isinstance(found, dict):
            return found
    return {}


def _is_whole(folder: Path) -> bool:
    files = read_object(folder / _MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        return False
    try:
        return all((folder / n).stat().st_size == f["bytes"] for n, f in files.items())
    except (OSError, KeyError, TypeError):
        return False


def _number(text: str) -> int | float:
    """A whole number that no float can stand for is none of ours."""
    return int(text) if len(text) < _LONGEST_NUMBER else math.nan


def _parsed(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(line, parse_int=_number)
        if isinstance(found, dict):
            return found
    return {}


def _has_numbers(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and isinstance(line.get("time"), int | float)
