"""What a score is called beside another, and the learning curve."""

import json
import random

import pytest

from softprompt_dist.run.learning_curve import plot_learning_curve, running_mean
from softprompt_dist.run.report import interval_text, verdict

TUNED = ("tuned prompt", 85.0)


@pytest.mark.parametrize(
    ("other", "interval", "sentence"),
    [
        (("majority class", 51.0), (25.5, 42.0), "is above majority class (51.0) by 34.0 points "),
        (("naive Bayes", 96.25), (-16.0, -5.5), "is BELOW naive Bayes (96.2) by 11.2 points "),
    ],
)
def test_beyond_chance_the_verdict_has_the_interval(other, interval, sentence):
    said = verdict(TUNED, other, interval)
    assert said.startswith(f"The tuned prompt (85.0) {sentence}(95 % interval ")
    low, high = sorted(map(abs, interval))
    assert said.endswith(f" {low:.1f} to {high:.1f}).")


@pytest.mark.parametrize("interval", [(-2.0, 8.0), (0.0, 6.0)])
def test_a_score_within_chance_of_another_is_not_called_a_win(interval):
    said = verdict(TUNED, ("naive Bayes", 82.0), interval)
    assert said == (
        "The tuned prompt (85.0) is above naive Bayes (82.0) by 3.0 points, which may be chance "
        "at this n."
    )


def test_equal_scores_are_equal():
    said = verdict(TUNED, ("itself", 85.0), (-1.0, 1.0))
    assert said == "The tuned prompt (85.0) is equal to itself (85.0)."


def test_an_interval_in_words():
    assert interval_text((71.44, 86.16)) == "71.4 to 86.2"


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


def test_the_learning_curve_shows_the_metric_asked_for_beside_the_floors(tmp_path):
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "learning_curve.png"
    write_metrics(metrics, 300)
    pictures = []
    for floors, score in (({"majority class": 51.0}, "accuracy"), ({}, "accuracy"), ({}, "f1")):
        plot_learning_curve(metrics, floors, png, score=score)
        pictures.append(png.read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_ended_at_once_still_gets_a_picture(tmp_path, steps):
    write_metrics(tmp_path / "metrics.jsonl", steps)
    plot_learning_curve(tmp_path / "metrics.jsonl", {"floor": 50.0}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_running_mean():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([5.0, 7.0], 1) == [5.0, 7.0]
