"""What a person sees of a run: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from time import monotonic
from typing import Any, Protocol

from tqdm import tqdm

from softprompt_dist.progress import LINE_SECONDS, is_terminal, spoke

TRAIN = "train"
_NUMBER = ".4g"

Formats = Mapping[str, str]
"""Metrics of a train step that are shown, with the format of each; the others are in the file."""


class Display(Protocol):
    """Where a run's progress appears."""

    def show(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, or not, as there is room."""

    def say(self, text: str) -> None:
        """Show `text`, always."""

    def close(self) -> None:
        """Leave the screen in order."""


class Silence:
    """The display of all ranks but rank 0."""

    def show(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Do nothing."""


class Lines:
    """Plain lines on stdout with the time left: train steps every few seconds, all else always."""

    def __init__(self, total_steps: int, shown: Formats | None = None) -> None:
        self._total_steps = total_steps
        self._shown = shown
        self._first: tuple[int, float] | None = None
        self._last_shown_at = -LINE_SECONDS

    def show(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Print a line; a train step only if the last one was printed some seconds ago."""
        now = monotonic()
        if kind != TRAIN:
            self.say(self._line(step, kind, _format(metrics)))
            return
        self._first = self._first or (step, now)
        is_due = now - self._last_shown_at >= LINE_SECONDS
        if is_due or step == self._total_steps:
            self._last_shown_at = now
            line = self._line(step, kind, _format(metrics, self._shown))
            self.say(f"{line}  ETA {self._time_left(step, now)}")

    def say(self, text: str) -> None:
        """Print `text` at once, also into a pipe."""
        print(text, flush=True)
        spoke()

    def close(self) -> None:
        """Nothing is open."""

    def _line(self, step: int, kind: str, text: str) -> str:
        width = len(str(self._total_steps))
        return f"step {step:>{width}}/{self._total_steps}  {kind}  {text}"

    def _time_left(self, step: int, now: float) -> str:
        # Counted from the end of the first step: what came before it was not training.
        first_step, first_time = self._first or (step, now)
        if step == first_step:
            return "?"
        seconds_per_step = (now - first_time) / (step - first_step)
        return str(timedelta(seconds=round((self._total_steps - step) * seconds_per_step)))


class Bar:
    """A progress bar on stderr; words and scores go to stdout, above it."""

    def __init__(self, total_steps: int, shown: Formats | None = None) -> None:
        self._total_steps = total_steps
        self._shown = shown
        self._bar: Any = None
        self._scores = ""

    def show(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Move the bar at a train step; print a line for any other kind."""
        if kind != TRAIN:
            self._scores = f"  {kind} {_format(metrics)}"
            self.say(f"step {step}/{self._total_steps}{self._scores}")
            return
        if self._bar is None:
            # Now and not earlier: what came before the first step would spoil the time left.
            self._bar = tqdm(
                total=self._total_steps, initial=step, unit="step", dynamic_ncols=True, leave=True
            )
        if metrics:
            shown = self._shown or dict.fromkeys(list(metrics)[:1], _NUMBER)
            self._bar.set_postfix_str(_format(metrics, shown) + self._scores, refresh=False)
        self._bar.update(step - self._bar.n)
        spoke()

    def say(self, text: str) -> None:
        """Print `text` above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def open_display(total_steps: int, shown: Formats | None = None) -> Display:
    """A bar if stderr is a terminal, else lines.

    Without `shown`, lines have all metrics and a bar has the first.
    """
    return Bar(total_steps, shown) if is_terminal(sys.stderr) else Lines(total_steps, shown)


def _format(metrics: Mapping[str, float], shown: Formats | None = None) -> str:
    formats = dict.fromkeys(metrics, _NUMBER) if shown is None else shown
    chosen = [name for name in formats if name in metrics]
    return "  ".join(f"{name} {metrics[name]:{formats[name]}}" for name in chosen)
