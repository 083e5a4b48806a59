"""The course of an adaptation as one picture."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.durable import replace_file
from softprompt_dist.parallel import ranks
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.learning_curve import dress, running_mean
from softprompt_dist.run.metrics_file import points, read_metrics

log = logging.getLogger(__name__)

_BLUE, _LIGHT_BLUE, _ORANGE, _GREEN = "#1f5fa8", "#a9c6e8", "#d1600a", "#3f8f4f"
_COLUMNS = 2
_MANY_POINTS = 60
_WIDE = 3.0
"""Values whose largest is so many times their smallest are shown on a logarithmic scale."""


@dataclass(frozen=True)
class _Curve:
    kind: str
    metric: str
    label: str = ""
    color: str = _BLUE
    is_noisy: bool = False
    """Drawn with a running mean."""


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    from_zero: bool = True


_LOSSES = _Panel(
    "Loss",
    "nats per target token",
    (
        _Curve("train", "loss", "training", is_noisy=True),
        _Curve("validation", "prefix_lm_nll", "validation, prefix LM", _ORANGE),
        _Curve("validation", "span_corruption_nll", "validation, span corruption", _GREEN),
        _Curve("validation", "lm_nll", "validation, next token", _ORANGE),
    ),
    from_zero=False,
)
_OTHERS = (
    _Panel(
        "Greedy continuations that begin with a sentinel",
        "% of rows",
        (_Curve("validation", "sentinel_leak", color=_ORANGE),),
    ),
    _Panel("Learning rate", "", (_Curve("train", "learning_rate"),)),
    _Panel(
        "Norm of the gradient",
        "",
        (_Curve("train", "gradient_norm", is_noisy=True),),
        from_zero=False,
    ),
    _Panel(
        "Size of updates (root mean squares)",
        "update / weights",
        (_Curve("train", "relative_update_rms", is_noisy=True),),
    ),
    _Panel("Speed without padding", "tokens / second", (_Curve("train", "tokens_per_second"),)),
    _Panel(
        "MFU and padding",
        "%",
        (
            _Curve("train", "mfu", "MFU, of the peak"),
            _Curve("train", "padding", "padding, of all positions", _ORANGE),
        ),
    ),
)


def draw_curves(directory: RunDirectory) -> None:
    """Draw `plots/adaptation.png` on rank 0; what goes wrong is a warning. No collective."""
    if not ranks.is_main():
        return
    try:
        plot_adaptation(directory.metrics, directory.plots / "adaptation.png")
    except Exception as error:  # a picture is no reason to lose a run
        log.warning("The curves of the run are not drawn: %s: %s", type(error).__name__, error)


def plot_adaptation(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw what a run has logged so far over steps: losses above, whatever else there is below.

    Args:
        metrics_path: metrics.jsonl of the run.
        png_path: written whole; its folder must exist.

    Raises:
        OSError: the picture cannot be written.
    """
    # Imported here: it takes a second. Figure, not pyplot: no global state and no display needed.
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)
    panels = [panel for panel in _OTHERS if any(_curves(panel, lines))]
    num_rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(11, 4 + 2.4 * num_rows), dpi=130, layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, _COLUMNS, height_ratios=[1.5, *[1] * num_rows])
    loss_axes = figure.add_subplot(grid[0, :])
    _draw(loss_axes, _LOSSES, lines)
    for number, panel in enumerate(panels):
        place = grid[1 + number // _COLUMNS, number % _COLUMNS]
        _draw(figure.add_subplot(place, sharex=loss_axes), panel, lines)
    for axes in figure.axes[-_COLUMNS:]:
        axes.set_xlabel("step")
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(Path(png_path), picture.getvalue())


def _curves(
    panel: _Panel, lines: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[_Curve, list[int], list[float]]]:
    for curve in panel.curves:
        steps, values = points(lines, curve.kind, curve.metric)
        finite = [i for i, value in enumerate(values) if math.isfinite(value)]
        if finite:
            yield curve, [steps[i] for i in finite], [values[i] for i in finite]


def _draw(axes: Any, panel: _Panel, lines: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.set_ylabel(panel.unit)
    drawn = []
    for curve, steps, values in _curves(panel, lines):
        drawn += values
        style = {"color": curve.color, "linewidth": 1.8, "label": curve.label}
        width = max(1, len(steps) // 100)
        if curve.is_noisy and width > 1:
            axes.plot(steps, values, color=_LIGHT_BLUE, linewidth=0.8)
            axes.plot(steps, running_mean(values, width), **style)
        else:
            marker = "" if len(steps) > _MANY_POINTS else "o"
            axes.plot(steps, values, marker=marker, markersize=3.5, **style)
    _scale(axes, drawn, from_zero=panel.from_zero)
    dress(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")


def _scale(axes: Any, values: Sequence[float], *, from_zero: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    if from_zero:
        axes.set_ylim(0, 1.1 * max([*values, 0]) or 1)
    elif values and 0 < _WIDE * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(plain)
