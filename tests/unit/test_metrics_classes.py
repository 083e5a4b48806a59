"""Per-class tables and the confusion matrix."""

import numpy as np
import pytest

from softprompt_dist.errors import DataError
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.classes import class_scores, class_table, confusion_counts
from softprompt_dist.metrics.confusion_plot import MAX_LABELS, plot_confusion
from softprompt_dist.metrics.scores import measure
from softprompt_dist.metrics.table import markdown_table
from tests.answers import LABELS, answers_for

ANSWERS = [
    *[Answer("no", "no")] * 3,
    *[Answer("yes", "no")] * 1,
    *[Answer("yes", "yes")] * 2,
    *[Answer("No", "yes")] * 2,
]


def test_rows_are_targets_and_the_last_column_is_invalid():
    assert confusion_counts(ANSWERS, LABELS).tolist() == [[3, 1, 0, 0], [0, 2, 0, 2], [0] * 4]


def test_the_table_tells_every_class():
    lines = class_table(class_scores(confusion_counts(ANSWERS, LABELS), LABELS)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["label", "n", "predicted", "precision", "recall", "F1"]
    assert cells[2:] == [
        ["no", "4", "3", "100.0", "75.0", "85.7"],
        ["yes", "4", "3", "66.7", "50.0", "57.1"],
        ["maybe", "0", "0", "-", "-", "-"],
        ["(invalid)", "0", "2", "-", "-", "-"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_mean_of_the_classes_is_macro_f1():
    answers = answers_for("macro_f1", 80)
    scores = class_scores(confusion_counts(answers, LABELS), LABELS)[:-1]
    macro = measure(["macro_f1"], answers, LABELS, num_resamples=0).score
    assert sum(score.f1 for score in scores) / 3 == pytest.approx(macro)


def test_a_target_that_is_no_label_is_refused():
    with pytest.raises(DataError, match="'maybe' is none of the labels"):
        confusion_counts([Answer("no", "maybe")], LABELS[:2])


def test_cells_that_would_break_a_table_do_not():
    table = markdown_table(("a|b", "n"), [("x\ny|z", "1"), ("", "22")])
    assert table.splitlines() == [
        "| a\\|b   |  n |",
        "|:-------|---:|",
        "| x y\\|z |  1 |",
        "|        | 22 |",
    ]


@pytest.mark.parametrize(
    "labels", [LABELS, ("a $ of x_{1}", "y" * 90), tuple(map(str, range(MAX_LABELS)))]
)
def test_the_confusion_matrix_is_a_picture(tmp_path, labels):
    counts_LC = np.arange(len(labels) * (len(labels) + 1)).reshape(len(labels), -1)
    plot_confusion(counts_LC, labels, tmp_path / "confusion.png", title="boolq")
    picture = (tmp_path / "confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    plot_confusion(counts_LC[::-1], labels, tmp_path / "confusion.png", title="boolq")
    assert (tmp_path / "confusion.png").read_bytes() != picture


def test_a_picture_that_nobody_can_read_is_not_drawn(tmp_path):
    labels = tuple(map(str, range(MAX_LABELS + 1)))
    with pytest.raises(ValueError, match="31 labels"):
        plot_confusion(np.zeros((31, 32), int), labels, tmp_path / "confusion.png")
