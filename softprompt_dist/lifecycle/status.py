"""How a run is, told by its directory alone, from any machine: `softprompt status`.

Nothing here needs the run's processes, torch, or a permission to write. Files may be replaced, and
checkpoints removed, while they are looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from softprompt_dist.lifecycle.heartbeat import HEARTBEAT
from softprompt_dist.lifecycle.ownership import (
    ATTEMPT,
    Owner,
    is_alive,
    read_owner,
    seconds_since_heartbeat,
)
from softprompt_dist.lifecycle.traces import (
    CheckpointTrace,
    MetricsTrace,
    newest_checkpoint,
    number_of_attempts,
    read_object,
    tail_of_metrics,
)
from softprompt_dist.outcome_files import RUNNING, OutcomeFiles, first_line

State = Literal[
    "done", "running", "starting", "silent", "dead", "stopped", "failed", "never started"
]
GOING_ON: tuple[State, ...] = ("done", "running", "starting")
"""States in which nobody need look."""

_MARKS = ("config.yaml", ATTEMPT, HEARTBEAT, "why", "step", "DONE", "STOP", "checkpoints")
_STARTING_SECONDS = 120.0
"""From a start until the ranks have met."""
_PART_OF_LIMIT = 0.25
"""Of what the watchdog allows: who is silent for so long is likely to stay so."""
_BEATS_MISSED = 12
_MAY_CONTINUE = "The same command goes on from the newest checkpoint."
_WITHOUT_A_WORD = (
    "It has begun, but there is neither a heartbeat nor a word of its end, as with releases that "
    f"left none. {_MAY_CONTINUE}"
)
_EXPORTED = Path("export", "config.json")
"""What the last step of a stage leaves."""


@dataclass(frozen=True)
class RunStatus:
    """How a run is, and what else its directory tells of it."""

    directory: Path
    state: State
    summary: str
    """One sentence: since when, why, what next."""
    beat: Mapping[str, Any] = field(default_factory=dict)
    """The latest heartbeat."""
    owner: Owner | None = None
    checkpoint: CheckpointTrace | None = None
    metrics: MetricsTrace = field(default_factory=MetricsTrace)
    attempts: int = 0
    stages: tuple[RunStatus, ...] = ()
    """Of an adaptation, or the runs of a sweep, in folders of their own."""

    @property
    def step(self) -> int | None:
        """The last one that is known of."""
        known = [self.beat.get("step"), self.metrics.step]
        known += [self.checkpoint.step] if self.checkpoint else []
        return max((step for step in known if isinstance(step, int)), default=None)

    @property
    def steps(self) -> int | None:
        """How many there are to be."""
        steps = self.beat.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def spikes(self) -> tuple[int, int | None]:
        """How many losses were flagged, and the step of the last.

        Of all steps, as the run itself has counted; else of the latest.
        """
        count, last = self.beat.get("loss_spikes"), self.beat.get("last_loss_spike_step")
        if isinstance(count, int):
            return count, last if isinstance(last, int) else None
        return self.metrics.spikes, self.metrics.last_spike_step

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the latest steps; None for a run that does not go on."""
        pace = self.metrics.seconds_per_step
        if self.state != "running" or None in (self.step, self.steps, pace):
            return None
        return max(0, self.steps - self.step) * pace  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        beat = self.beat
        return {
            "directory": str(self.directory),
            "state": self.state,
            "summary": self.summary,
            "verb": beat.get("verb"),
            "name": beat.get("name"),
            "step": self.step,
            "steps": self.steps,
            "loss": _finite(beat.get("loss")),
            "tokens_per_second": _finite(beat.get("tokens_per_second")),
            "seconds_left": self.seconds_left,
            "doing": beat.get("doing"),
            "straggler": beat.get("straggler"),
            "loss_spikes": self.spikes[0],
            "last_loss_spike_step": self.spikes[1],
            "checkpoint": vars(self.checkpoint) if self.checkpoint else None,
            "attempts": self.attempts,
            "job": (self.owner.job if self.owner else beat.get("job")) or None,
            "host": self.owner.host if self.owner else beat.get("host"),
            "pid": self.owner.pid if self.owner else beat.get("pid"),
            "device": beat.get("device"),
            "stages": [stage.to_json() for stage in self.stages],
        }


def is_run_directory(folder: Path) -> bool:
    """Whether a run has left something there, or is to."""
    return any((folder / mark).exists() for mark in _MARKS)


def read_status(folder: Path) -> RunStatus | None:
    """How the run in `folder` is; None where neither it nor a folder in it is a run's."""
    below = _runs_below(folder)
    if not is_run_directory(folder) and not below:
        return None
    whole = _status(folder)
    if not whole.owner and not whole.beat:
        stages = tuple(map(_status, below))
        return _of_stages(replace(whole, stages=stages)) if stages else whole
    stages = tuple(_stage(each, whole) for each in below)
    present = [stage.metrics for stage in stages if _is_at(stage.directory, whole)]
    return replace(whole, stages=stages, metrics=present[0] if present else whole.metrics)


def _runs_below(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and is_run_directory(each))
    except OSError:
        return []


def _status(folder: Path) -> RunStatus:
    owner, beat = read_owner(folder), read_object(folder / HEARTBEAT)
    state, summary = _judge(folder, owner, beat)
    status = RunStatus(
        directory=folder,
        state=state,
        summary=summary,
        beat=beat,
        owner=owner,
        checkpoint=newest_checkpoint(folder / "checkpoints"),
        metrics=tail_of_metrics(folder / "metrics.jsonl"),
        attempts=number_of_attempts(folder / "environment.json"),
    )
    if state == "never started" and status.step is not None:
        return replace(status, state="dead", summary=_WITHOUT_A_WORD)
    return status


def _stage(folder: Path, whole: RunStatus) -> RunStatus:
    """A stage of an adaptation, whose attempts are those of the whole."""
    found = _status(folder)
    if found.owner or found.beat:
        return found
    if (folder / _EXPORTED).exists():
        return replace(found, state="done", summary="Exported.")
    if _is_at(folder, whole):
        return replace(found, state=whole.state, summary=whole.summary)
    if found.step is None:
        return found
    return replace(found, state="stopped", summary="Begun, and not complete.")


def _is_at(folder: Path, whole: RunStatus) -> bool:
    return str(whole.beat.get("stage", "")).endswith(f"-{folder.name}")


def _of_stages(status: RunStatus) -> RunStatus:
    """A folder whose runs are all below: it is as the last of them that has begun."""
    state, summary = status.state, status.summary
    begun = [stage for stage in status.stages if stage.state != "never started"]
    # What the folder itself says of an end stands; `running` may be a stage's.
    if begun and state in ("never started", "starting", "dead"):
        alive = [s for s in begun if s.state in ("running", "starting", "silent")]
        shown = (alive or [s for s in begun if s.state != "done"] or begun)[-1]
        state, summary = shown.state, f"{shown.directory.name}: {shown.summary}"
        if state == "done" and len(begun) < len(status.stages):
            state, summary = "stopped", f"{summary} What comes after it has not begun."
    return replace(status, state=state, summary=summary)


def _judge(folder: Path, owner: Owner | None, beat: Mapping[str, Any]) -> tuple[State, str]:
    files = OutcomeFiles(folder)
    if owner is not None and is_alive(owner, folder):
        return _of_living(folder, owner, beat)
    why = first_line(files.why)
    if files.done.exists():
        return "done", f"Complete at step {first_line(files.done) or '?'}."
    if files.stop.exists():
        reason = first_line(files.stop) or "no reason given"
        return "stopped", f"STOP: {reason}. Remove {files.stop} to let it go on."
    return _of_ended(files, owner, why)


def _of_living(folder: Path, owner: Owner, beat: Mapping[str, Any]) -> tuple[State, str]:
    where = owner.described
    if beat.get("token") != owner.token:
        return "starting", f"{where} has just begun."
    age = seconds_since_heartbeat(folder)
    doing = beat.get("doing") or "between phases"
    silent = age + _number(beat.get("silent_seconds"))
    limit = _number(beat.get("limit_seconds"))
    every = max(5.0, _number(beat.get("heartbeat_seconds")))
    if age > _BEATS_MISSED * every:
        return "silent", f"{where} lives, but its heart has not beaten for {duration(age)}."
    if limit and silent > _PART_OF_LIMIT * limit:
        return "silent", (
            f"{where}: no progress for {duration(silent)} while {doing}; it ends itself after "
            f"{duration(limit)}."
        )
    asked = "; STOP asks it to end" if OutcomeFiles(folder).stop.exists() else ""
    return "running", f"{where}, {doing}{asked}."


def _of_ended(files: OutcomeFiles, owner: Owner | None, why: str) -> tuple[State, str]:
    kind, _, reason = why.partition(": ")
    if kind in ("fatal", "error", "hang"):
        return "failed", why
    if kind == "signal":
        return "stopped", f"{reason} {_MAY_CONTINUE}"
    if kind == "stop":
        return "stopped", f"{reason} STOP is gone. {_MAY_CONTINUE}"
    if owner is not None:
        return "dead", f"{owner.described} is gone, or halted, without a word. {_MAY_CONTINUE}"
    if why == RUNNING:
        if _age(files.why) < _STARTING_SECONDS:
            return "starting", "The ranks have not met yet."
        return "dead", f"Ended without a word: killed, or by a bug of ours. {_MAY_CONTINUE}"
    if why == "done":
        return "dead", f"Killed when all but DONE was written. {_MAY_CONTINUE}"
    return "never started", "No attempt has left a trace."


def duration(seconds: float) -> str:
    """`42 s`, `13 min`, `5.2 h`, `3.1 d`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def _age(path: Path) -> float:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime
    return math.inf


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _finite(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
