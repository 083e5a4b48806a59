"""The picture of a run: what is in it follows what was logged, and it never stops a run."""

import json
import math

import matplotlib.figure
import pytest

from softprompt_dist.adaptation.curves import draw_curves, plot_adaptation
from softprompt_dist.parallel import ranks
from softprompt_dist.run.directory import RunDirectory

TRAIN = {
    "loss": 3.0,
    "learning_rate": 1e-3,
    "gradient_norm": 0.5,
    "relative_update_rms": 9e-4,
    "tokens_per_second": 2000.0,
    "mfu": 40.0,
    "padding": 5.0,
}
T5_VALIDATION = {"prefix_lm_nll": 2.5, "span_corruption_nll": 2.0, "sentinel_leak": 90.0}


@pytest.fixture
def directory(tmp_path):
    run = RunDirectory(tmp_path)
    run.create()
    return run


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    save = matplotlib.figure.Figure.savefig

    def remember(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", remember)
    return saved


def write(directory, *lines):
    texts = [json.dumps({"step": step, "kind": kind, "time": 0, **m}) for step, kind, m in lines]
    directory.metrics.write_text("\n".join(texts) + "\n")


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_a_t5_has_all_panels(directory, figures):
    write(directory, (0, "validation", T5_VALIDATION), (10, "train", TRAIN))
    draw_curves(directory)
    assert (directory.plots / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert titles(figure) == [
        "Loss",
        "Greedy continuations that begin with a sentinel",
        "Learning rate",
        "Norm of the gradient",
        "Size of updates (root mean squares)",
        "Speed without padding",
        "MFU and padding",
    ]
    assert labels(figure.axes[0]) == [
        "training",
        "validation, prefix LM",
        "validation, span corruption",
    ]


def test_what_was_not_logged_has_no_panel(directory, figures):
    write(directory, (10, "train", {"loss": 3.0, "mfu": 40.0}), (10, "validation", {"lm_nll": 2.0}))
    draw_curves(directory)
    assert titles(figures[0]) == ["Loss", "MFU and padding"]
    assert labels(figures[0].axes[0]) == ["training", "validation, next token"]


def test_values_that_are_not_finite_are_left_out(directory, figures):
    losses = [3.0, math.nan, 2.0, math.inf]
    write(directory, *((step, "train", {"loss": loss}) for step, loss in enumerate(losses)))
    draw_curves(directory)
    (line,) = figures[0].axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 2]
    assert list(line.get_ydata()) == [3.0, 2.0]


@pytest.mark.parametrize(("last", "scale"), [(0.5, "log"), (9.0, "linear")])
def test_losses_far_apart_are_on_a_logarithmic_scale(directory, figures, last, scale):
    write(directory, (1, "train", {"loss": 10.0}), (2, "train", {"loss": last}))
    draw_curves(directory)
    assert figures[0].axes[0].get_yscale() == scale


def test_a_run_that_has_logged_nothing_has_a_picture_too(tmp_path):
    plot_adaptation(tmp_path / "metrics.jsonl", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_a_picture_that_cannot_be_written_is_a_warning(directory, caplog):
    write(directory, (10, "train", TRAIN))
    directory.plots.rmdir()
    draw_curves(directory)
    (record,) = caplog.records
    assert record.message.startswith("The curves of the run are not drawn: FileNotFoundError")


def test_only_rank_0_draws(directory, monkeypatch):
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    draw_curves(directory)
    assert not (directory.plots / "adaptation.png").exists()
