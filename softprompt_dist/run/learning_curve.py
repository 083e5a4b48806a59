"""The learning curve of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_dist.durable import replace_file
from softprompt_dist.run.metrics_file import points, read_metrics

_BLUE, _LIGHT_BLUE, _ORANGE = "#1f5fa8", "#a9c6e8", "#d1600a"
_GREYS = ("#333333", "#777777", "#aaaaaa")
_DASHES = ("--", ":", "-.")


def plot_learning_curve(
    metrics_path: str | Path,
    floors: Mapping[str, float],
    png_path: str | Path,
    *,
    score: str = "accuracy",
) -> None:
    """Draw training loss and validation score over steps, with a level line for each floor.

    Args:
        metrics_path: metrics.jsonl of the run.
        floors: name -> score in percent.
        png_path: written whole; its folder must exist.
        score: name of the validation metric.

    Raises:
        OSError: the picture cannot be written.
    """
    # Imported here: it takes a second. Figure, not pyplot: no global state and no display needed.
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    loss_axes, score_axes = figure.subplots(2, 1, sharex=True)
    _draw_loss(loss_axes, points(lines, "train", "loss"))
    _draw_score(score_axes, points(lines, "validation", score), floors, score)
    score_axes.set_xlabel("step (updates of the prompt)")
    for axes in (loss_axes, score_axes):
        dress(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(Path(png_path), picture.getvalue())


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means


def dress(axes: Any) -> None:
    """Give the axes of a picture the looks of all our pictures."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_loss(axes: Any, points: tuple[list[int], list[float]]) -> None:
    steps, losses = points
    axes.set_ylabel("training loss\n(nats per token)")
    if not steps:
        return
    width = max(1, len(steps) // 30)
    axes.plot(steps, losses, color=_LIGHT_BLUE, linewidth=1, label="each step")
    if width > 1:
        mean = running_mean(losses, width)
        axes.plot(steps, mean, color=_BLUE, linewidth=2, label=f"mean of {width} steps")
    axes.set_ylim(bottom=0)


def _draw_score(
    axes: Any, points: tuple[list[int], list[float]], floors: Mapping[str, float], score: str
) -> None:
    steps, scores = points
    axes.set_ylabel(f"validation {score} (%)")
    axes.plot(steps, scores, color=_ORANGE, linewidth=2, marker="o", markersize=5, label="prompt")
    for i, (name, value) in enumerate(sorted(floors.items(), key=lambda item: -item[1])):
        style = {"color": _GREYS[i % len(_GREYS)], "linestyle": _DASHES[i % len(_DASHES)]}
        axes.axhline(value, linewidth=1.5, label=f"{name} ({value:.1f})", **style)
    values = [*scores, *floors.values()]
    if values:
        margin = 5 + 0.1 * (max(values) - min(values))
        bottom = 0.0 if min(values) >= 0 else -102.0
        axes.set_ylim(max(bottom, min(values) - margin), min(102.0, max(values) + margin))
