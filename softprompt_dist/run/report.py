"""What a run achieved: scores with their uncertainty beside the floors they must beat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt_dist.durable import replace_file
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.learning_curve import plot_learning_curve
from softprompt_dist.run.metrics import wilson_interval

__all__ = [
    "ScoreRow",
    "plot_learning_curve",
    "results_table",
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
        """Share of correct answers, in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.total)


def results_table(rows: Sequence[ScoreRow]) -> str:
    """Markdown table, aligned for a terminal too: name, accuracy, 95 % interval, n."""
    cells = [("", "accuracy", "95 % interval", "n")]
    for row in rows:
        low, high = row.interval
        cells.append((row.name, f"{row.accuracy:.3f}", f"{low:.3f} to {high:.3f}", str(row.total)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_table_line(line, widths) for line in cells]
    rule = f"|:{'-' * widths[0]}-|" + "|".join(f"-{'-' * width}:" for width in widths[1:]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def verdicts(rows: Sequence[ScoreRow], subject: str = "tuned prompt") -> list[str]:
    """One sentence for each other row: is `subject` above it, and beyond the 95 % intervals?

    Intervals that do not touch are a stricter test than a paired one at the same level.
    """
    judged = next(row for row in rows if row.name == subject)
    return [_verdict(judged, row) for row in rows if row is not judged]


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


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = cells
    aligned = [
        name.ljust(widths[0]),
        *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)),
    ]
    return "| " + " | ".join(aligned) + " |"


def _verdict(judged: ScoreRow, other: ScoreRow) -> str:
    difference = judged.accuracy - other.accuracy
    (low, high), (other_low, other_high) = judged.interval, other.interval
    apart = low > other_high or high < other_low
    relation = "above" if difference > 0 else "BELOW" if difference < 0 else "equal to"
    judged_text, other_text = (f"{row.name} ({row.accuracy:.3f})" for row in (judged, other))
    start = f"The {judged_text} is {relation} {other_text}"
    if difference == 0:
        return f"{start}."
    if apart:
        return f"{start} by {abs(difference):.3f}; the intervals do not overlap."
    return (
        f"{start} by {abs(difference):.3f}, but the intervals overlap: not beyond chance at this n."
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
