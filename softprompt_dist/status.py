"""`softprompt status`: whether a run lives, how far it is, and why it ended, from its directory.

softprompt status runs/demo
softprompt status runs/sweep/*
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from softprompt_dist.errors import ConfigError, SoftpromptError
from softprompt_dist.lifecycle.status import GOING_ON, RunStatus, duration, read_status
from softprompt_dist.parallel.verb import VerbParser, run_verb

_HEADER = ("run", "state", "step", "loss", "tokens/s", "left", "checkpoint", "")
_LONGEST_SUMMARY = 100
_PLACES = ("log", "stacks", "report.md", "metrics.jsonl")
"""Where to look, if it is there."""


class NotGoingOnError(SoftpromptError):
    """At least one run is neither done nor alive; what was printed says which."""

    exit_code = 1
    outcome = ""  # this verb is no attempt at a run


class NoRunError(ConfigError):
    """A directory that is asked about is none, or no run's."""

    outcome = ""


def build_parser() -> VerbParser:
    """Options of `softprompt status`."""
    parser = VerbParser(
        "status",
        "Tell how runs are, from any machine that sees their directories. Exit code 0: all are "
        "done or alive; 1: one is not; 2: one is no run directory.",
    )
    parser.add_argument("directories", metavar="RUN_DIR", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="a JSON list, for programs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`.

    Raises:
        NoRunError: a directory is not there, or is no run's.
        NotGoingOnError: a run is neither done nor alive.
    """
    options = build_parser().parse_args(argv)
    found = [_found(directory) for directory in options.directories]
    if options.json:
        print(json.dumps([status.to_json() for status in found], indent=1))
    elif len(found) == 1:
        print("\n".join(_screen(found[0])))
    else:
        print("\n".join(_table(found)))
    ended = [str(status.directory) for status in found if status.state not in GOING_ON]
    if ended:
        raise NotGoingOnError(f"Neither done nor alive: {', '.join(ended)}.")


def _found(directory: Path) -> RunStatus:
    if not directory.is_dir():
        raise NoRunError(
            f"{directory} is no directory. Name the folder that --run-dir, or run_directory in the "
            "recipe, named for the run."
        )
    status = read_status(directory)
    if status is None:
        raise NoRunError(
            f"{directory} holds no run, nor does a folder in it: a run directory has config.yaml, "
            "heartbeat.json or checkpoints. Name the folder that --run-dir named for the run."
        )
    return status


def _screen(status: RunStatus) -> Iterator[str]:
    """All about one run."""
    what = ", ".join(str(status.beat[key]) for key in ("verb", "name") if status.beat.get(key))
    yield f"{status.directory}{f'  ({what})' if what else ''}"
    yield from (f"  {name:<14} {text}" for name, text in _lines(status) if text)
    if status.stages:
        yield ""
        yield from _table(status.stages)


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield status.state, status.summary
    yield "step", _progress(status)
    yield "checkpoint", _checkpoint(status)
    yield "attempts", str(status.attempts or "")
    yield "straggler", str(status.beat.get("straggler") or "")
    yield "loss spikes", _spikes(status)
    places = [status.directory / name for name in _PLACES]
    yield "look at", ", ".join(str(place) for place in places if _has_content(place))


def _has_content(place: Path) -> bool:
    """Batch scripts make the folder of stacks before there are any."""
    return any(place.iterdir()) if place.is_dir() else place.exists()


def _progress(status: RunStatus) -> str:
    if status.step is None:
        return ""
    parts = [_steps(status)]
    if status.steps:
        parts[0] += f" ({100 * status.step / status.steps:.0f} %)"
    loss, speed = _loss(status), _speed(status)
    parts += [f"loss {loss}"] if loss else []
    parts += [f"{speed} tokens/s"] if speed else []
    parts += [f"about {_left(status)} left"] if _left(status) else []
    return ", ".join(parts)


def _checkpoint(status: RunStatus) -> str:
    found = status.checkpoint
    if found is None:
        return "" if status.stages else "none"
    if not found.is_whole:
        return f"step {found.step}: DAMAGED; the run goes on from the one before"
    return f"step {found.step}, {duration(found.age_seconds)} old, whole"


def _spikes(status: RunStatus) -> str:
    count, last = status.spikes
    if not count:
        return ""
    return f"{count}" + (f", the last at step {last}" if last is not None else "")


def _table(found: Sequence[RunStatus]) -> Iterator[str]:
    """A line for each run."""
    rows = [_HEADER, *(_row(status) for status in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _row(status: RunStatus) -> tuple[str, ...]:
    kept = status.checkpoint
    saved = "" if kept is None else f"{kept.step}{'' if kept.is_whole else ' DAMAGED'}"
    summary = status.summary
    if len(summary) > _LONGEST_SUMMARY:
        summary = summary[:_LONGEST_SUMMARY] + "..."
    numbers = (_loss(status), _speed(status), _left(status))
    return str(status.directory), status.state, _steps(status), *numbers, saved, summary


def _steps(status: RunStatus) -> str:
    if status.step is None:
        return ""
    return f"{status.step} of {status.steps}" if status.steps else f"{status.step}"


def _loss(status: RunStatus) -> str:
    loss = status.beat.get("loss", status.metrics.loss)
    return f"{loss:.4g}" if isinstance(loss, int | float) else ""


def _speed(status: RunStatus) -> str:
    speed = status.beat.get("tokens_per_second")
    return f"{speed:,.0f}" if status.state == "running" and speed else ""


def _left(status: RunStatus) -> str:
    seconds = status.seconds_left
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    run_verb(main)
