import json
import random

import pytest

from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.learning_curve import running_mean
from softprompt_dist.run.report import (
    ScoreRow,
    difference_interval,
    plot_learning_curve,
    results_table,
    verdicts,
    write_report,
)

ROWS = [
    ScoreRow("majority class", 102, 200),
    ScoreRow("naive Bayes", 164, 200),
    ScoreRow("untuned prompt", 184, 200),
    ScoreRow("tuned prompt", 184, 200),
]


def test_the_table_has_accuracy_interval_and_n():
    lines = results_table(ROWS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [c.strip() for c in lines[0].strip("|").split("|")] == [
        "",
        "accuracy",
        "95 % interval",
        "n",
    ]
    # Wilson interval of 164 / 200, computed by hand from its formula.
    assert [c.strip() for c in lines[3].strip("|").split("|")] == [
        "naive Bayes",
        "82.0",
        "76.1 to 86.7",
        "200",
    ]


def test_the_verdict_says_above_below_or_within_chance():
    majority, bayes, untuned = verdicts(ROWS)
    assert majority == (
        "The tuned prompt (92.0) is above majority class (51.0) by 41.0 points "
        "(95 % interval 32.8 to 48.5)."
    )
    assert "above naive Bayes (82.0) by 10.0 points (95 % interval " in bayes
    assert untuned == "The tuned prompt (92.0) is equal to untuned prompt (92.0)."


def test_a_score_within_chance_of_a_floor_is_not_called_a_win():
    rows = [ScoreRow("naive Bayes", 164, 200), ScoreRow("tuned prompt", 170, 200)]
    assert "may be chance" in verdicts(rows)[0]
    rows = [ScoreRow("naive Bayes", 164, 200), ScoreRow("tuned prompt", 120, 200)]
    assert "is BELOW naive Bayes (82.0) by 22.0 points (95 % interval " in verdicts(rows)[0]


def test_the_interval_of_a_difference_is_that_of_the_literature():
    # Newcombe 1998, table II: 56/70 against 48/80, method 10.
    interval = difference_interval(ScoreRow("a", 56, 70), ScoreRow("b", 48, 80))
    assert interval == pytest.approx((5.24, 33.39), abs=5e-3)


def test_the_report_is_written_for_people_and_for_programs(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.create()
    summary = write_report(directory, ROWS, title="Demo")
    report = directory.report.read_text()
    assert report.startswith("# Demo\n\n| ")
    assert summary in report
    assert "learning_curve" not in report
    results = json.loads(directory.results.read_text())
    assert results["rows"][3]["accuracy"] == 92.0
    assert results["rows"][3]["interval_95"] == pytest.approx([87.4, 95.0], abs=0.1)
    assert results["verdicts"] == verdicts(ROWS)


def write_metrics(path, steps, seed=0):
    generator = random.Random(seed)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            loss = 0.2 + 2 / (1 + step / 20) * generator.uniform(0.6, 1.4)
            file.write(json.dumps({"step": step, "kind": "train", "time": 0, "loss": loss}) + "\n")
            if step % 25 == 0:
                score = 91 - 30 / (1 + step / 30)
                line = {"step": step, "kind": "validation", "time": 0, "accuracy": score}
                file.write(json.dumps(line) + "\n")


def test_the_learning_curve_is_a_picture_that_the_report_shows(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.create()
    write_metrics(directory.metrics, 300)
    png = directory.plots / "learning_curve.png"
    plot_learning_curve(directory.metrics, {"majority class": 51.0, "naive Bayes": 82.0}, png)
    assert png.read_bytes().startswith(b"\x89PNG")
    without_floors = len(png.read_bytes())
    plot_learning_curve(directory.metrics, {}, png)
    assert len(png.read_bytes()) != without_floors
    write_report(directory, ROWS)
    assert "![Learning curve](plots/learning_curve.png)" in directory.report.read_text()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_ended_at_once_still_gets_a_picture(tmp_path, steps):
    write_metrics(tmp_path / "metrics.jsonl", steps)
    plot_learning_curve(tmp_path / "metrics.jsonl", {"floor": 50.0}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_running_mean():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([5.0, 7.0], 1) == [5.0, 7.0]
