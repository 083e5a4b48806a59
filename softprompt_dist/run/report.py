"""What a run achieved: scores with their uncertainty beside the floors they must beat."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt_dist.durable import replace_file
from softprompt_dist.metrics.table import markdown_table
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.learning_curve import plot_learning_curve
from softprompt_dist.run.metrics import wilson_interval

__all__ = [
    "ScoreRow",
    "difference_interval",
    "interval_text",
    "plot_learning_curve",
    "results_table",
    "verdict",
    "verdicts",
    "write_report",
]


@dataclass(frozen=True)
class ScoreRow:
    """How many of `total` examples something answered correctly."""

    name: str
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, in percent."""
        low, high = wilson_interval(self.correct, self.total)
        return 100 * low, 100 * high


def results_table(rows: Sequence[ScoreRow]) -> str:
    """Markdown table, aligned for a terminal too: name, accuracy, 95 % interval, n."""
    return markdown_table(
        ("", "accuracy", "95 % interval", "n"),
        [
            (row.name, f"{row.accuracy:.1f}", interval_text(row.interval), str(row.total))
            for row in rows
        ],
    )


def interval_text(interval: tuple[float, float]) -> str:
    """As `71.4 to 86.2`."""
    low, high = interval
    return f"{low:.1f} to {high:.1f}"


def verdicts(rows: Sequence[ScoreRow], subject: str = "tuned prompt") -> list[str]:
    """One sentence for each other row: is `subject` above it, by how much, and beyond chance?"""
    judged = next(row for row in rows if row.name == subject)
    ours = (judged.name, judged.accuracy)
    return [
        verdict(ours, (row.name, row.accuracy), difference_interval(judged, row))
        for row in rows
        if row is not judged
    ]


def write_report(
    directory: RunDirectory,
    rows: Sequence[ScoreRow],
    *,
    title: str = "Results",
) -> str:
    """Write report.md and results.json; returns the table and its verdicts for the screen.

    Args:
        directory: the run; its learning curve is shown where there is one.
        rows: floors and the tuned prompt, in the order of the table.
        title: heading of the report.

    Raises:
        OSError: the directory cannot be written.
    """
    sentences = verdicts(rows)
    summary = "\n".join([results_table(rows), "", *(f"- {sentence}" for sentence in sentences)])
    curve = directory.plots / "learning_curve.png"
    picture = [f"![Learning curve](plots/{curve.name})"] if curve.exists() else []
    text = "\n\n".join([f"# {title}", summary, *picture])
    replace_file(directory.report, (text + "\n").encode())
    results = {"rows": [_as_json(row) for row in rows], "verdicts": sentences}
    replace_file(directory.results, (json.dumps(results, indent=2) + "\n").encode())
    return summary


def difference_interval(row: ScoreRow, other: ScoreRow) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies in points (Newcombe 1998, method 10).

    For independent samples; rows scored on the same examples differ by less chance than that.
    """
    difference = row.accuracy - other.accuracy
    (low, high), (other_low, other_high) = row.interval, other.interval
    below = math.hypot(row.accuracy - low, other_high - other.accuracy)
    above = math.hypot(high - row.accuracy, other.accuracy - other_low)
    return difference - below, difference + above


def verdict(
    judged: tuple[str, float], other: tuple[str, float], interval: tuple[float, float]
) -> str:
    """One sentence on two (name, score in percent), given the 95 % interval of their difference."""
    judged_text, other_text = (f"{name} ({score:.1f})" for name, score in (judged, other))
    difference = judged[1] - other[1]
    relation = "above" if difference > 0 else "BELOW" if difference < 0 else "equal to"
    start = f"The {judged_text} is {relation} {other_text}"
    if difference == 0:
        return f"{start}."
    low, high = interval
    if low <= 0 <= high:
        return f"{start} by {abs(difference):.1f} points, which may be chance at this n."
    smallest, largest = sorted((abs(low), abs(high)))
    return (
        f"{start} by {abs(difference):.1f} points (95 % interval {smallest:.1f} to {largest:.1f})."
    )


def _as_json(row: ScoreRow) -> Mapping[str, object]:
    low, high = row.interval
    return {
        "name": row.name,
        "correct": row.correct,
        "total": row.total,
        "accuracy": row.accuracy,
        "interval_95": [low, high],
    }
