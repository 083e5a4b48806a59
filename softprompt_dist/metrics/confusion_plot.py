"""The confusion matrix as a picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprompt_dist.durable import replace_file
from softprompt_dist.metrics.classes import INVALID

# C classes (the labels and, last, invalid), L labels
MAX_LABELS = 30
"""More cannot be read in one picture."""
_DARK_SHARE = 55.0


def plot_confusion(
    counts_LC: NDArray[np.int64], labels: Sequence[str], png_path: Path, *, title: str = ""
) -> None:
    """Draw how each label was answered: counts, and the share of the row in percent and colour.

    Args:
        counts_LC: of `confusion_counts`.
        labels: the rows from the top; the columns are these and `INVALID`.
        png_path: written whole; its folder must exist.
        title: heading.

    Raises:
        OSError: the picture cannot be written.
        ValueError: there are more than `MAX_LABELS` labels.
    """
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels)} labels, but at most {MAX_LABELS} can be read.")
    # Imported here: it takes a second. Figure, not pyplot: no global state and no display needed.
    from matplotlib.figure import Figure

    shares_LC = 100 * counts_LC / np.maximum(counts_LC.sum(axis=1, keepdims=True), 1)
    size = (2.6 + 1.05 * (len(labels) + 1), 1.9 + 0.75 * len(labels))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares_LC, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    _name_axes(axes, labels, counts_LC)
    _write_cells(axes, counts_LC, shares_LC)
    axes.axvline(len(labels) - 0.5, color="#333333", linewidth=1.5)  # labels | invalid
    figure.colorbar(image, ax=axes, label="share of the row (%)", fraction=0.05, pad=0.03)
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(png_path, picture.getvalue())


def _name_axes(axes: Any, labels: Sequence[str], counts_LC: NDArray[np.int64]) -> None:
    columns = [_wrapped(label) for label in (*labels, INVALID)]
    axes.set_xticks(range(len(columns)), columns)
    if max(map(len, columns)) > 14 or len(columns) > 8:
        axes.tick_params(axis="x", rotation=35)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    totals = counts_LC.sum(axis=1)
    rows = [f"{_wrapped(label)}\n(n = {n})" for label, n in zip(labels, totals, strict=True)]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("prediction")
    axes.set_ylabel("target")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _wrapped(label: str) -> str:
    """Short enough for an axis; `$` would begin a formula."""
    text = label if len(label) <= 40 else label[:39] + "…"
    return "\n".join(textwrap.wrap(text, 16)).replace("$", r"\$")


def _write_cells(axes: Any, counts_LC: NDArray[np.int64], shares_LC: NDArray[np.float64]) -> None:
    for (row, column), count in np.ndenumerate(counts_LC):
        share = shares_LC[row, column]
        axes.text(
            column,
            row,
            f"{count}\n{share:.1f} %" if count else "0",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if share > _DARK_SHARE else "#222222" if count else "#999999",
        )
