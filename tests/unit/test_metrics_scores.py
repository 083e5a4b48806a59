"""Scores, their bootstrap intervals, and invalid answers."""

import numpy as np
import pytest
import scipy.stats

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.scores import compare, measure
from tests.answers import answers_for

LABELS = ("no", "yes")


def yes_no(rights, wrongs, group=None):
    facts = {} if group is None else {"group": group}
    return [Answer("yes", "yes", facts)] * rights + [Answer("no", "yes", facts)] * wrongs


def test_the_score_is_the_mean_of_the_values():
    answers = answers_for("f1", 50)
    scores = measure(["f1", "accuracy"], answers, LABELS)
    assert list(scores.values) == ["f1", "accuracy"]
    assert scores.score == pytest.approx((scores.values["f1"] + scores.values["accuracy"]) / 2)
    assert scores.num_answers == 50
    low, high = scores.score_interval
    assert low < scores.score < high


def test_an_interval_is_that_of_scipy():
    right = np.repeat([1.0, 0.0], [70, 30])
    ours = measure(["accuracy"], yes_no(70, 30), LABELS, num_resamples=20_000)
    reference = scipy.stats.bootstrap(
        (100 * right,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.intervals["accuracy"] == pytest.approx(tuple(reference), abs=0.5)
    assert ours.score_interval == ours.intervals["accuracy"]


def test_resamples_hold_whole_groups():
    """Ten answers that are always drawn together say as little as one of them."""
    grouped = [
        answer
        for index in range(20)
        for answer in yes_no(*((10, 0) if index < 10 else (0, 10)), group=str(index))
    ]
    ones = [answer for index in range(20) for answer in yes_no(*((1, 0) if index < 10 else (0, 1)))]
    alone = measure(["accuracy"], ones, LABELS, num_resamples=4000).intervals["accuracy"]
    exact = measure(["multirc"], grouped, LABELS, num_resamples=4000).intervals["exact_match"]
    assert exact == pytest.approx(alone, abs=3.0)
    free = measure(["accuracy"], grouped, LABELS, num_resamples=4000).intervals["accuracy"]
    assert free[1] - free[0] < 0.5 * (exact[1] - exact[0])


def test_order_of_members_of_a_group_is_free():
    answers = answers_for("multirc", 60)
    shuffled = [answers[i] for i in np.random.default_rng(3).permutation(60)]
    whole, mixed = (measure(["multirc"], each, LABELS).values for each in (answers, shuffled))
    assert whole == pytest.approx(mixed)


def test_a_query_that_gave_three_examples_counts_once_by_the_first():
    facts = {"group": "0", "answers": ["barn"]}
    answers = [Answer("barn", "barn", facts), Answer("red", "barn", facts)]
    assert measure(["record"], answers).values == {"em": 100.0, "f1": 100.0}
    assert measure(["record"], answers[::-1]).values == {"em": 0.0, "f1": 0.0}


def test_the_seed_decides_the_intervals():
    answers = answers_for("squad", 200)
    first, again, other = (measure(["squad"], answers, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.intervals != other.intervals
    assert first.values == other.values


def test_resamples_come_in_shares_without_a_seam(monkeypatch):
    answers = answers_for("squad", 64)
    whole = measure(["squad"], answers)
    monkeypatch.setattr("softprompt_dist.metrics.bootstrap._ELEMENTS_AT_ONCE", 64 * 10)
    shares = measure(["squad"], answers)
    assert shares.intervals["em"] == pytest.approx(whole.intervals["em"])
    assert shares.intervals["f1"] == pytest.approx(whole.intervals["f1"])


def test_a_difference_is_judged_on_the_same_rows():
    """Better in five rows of a hundred and nowhere worse is more than chance."""
    wrong = [Answer("no", "yes")] * 5
    ours, theirs = yes_no(75, 20) + yes_no(5, 0), yes_no(75, 20) + wrong
    found = compare(["accuracy"], ours, theirs, LABELS)
    assert found.points == pytest.approx(5.0)
    low, high = found.interval
    assert 0.0 < low < 5.0 < high
    apart = [measure(["accuracy"], each, LABELS).score_interval for each in (ours, theirs)]
    assert apart[0][0] < apart[1][1]
    back = compare(["accuracy"], theirs, ours, LABELS)
    assert back.points == pytest.approx(-5.0)
    assert back.interval == pytest.approx((-high, -low))


def test_only_answers_to_the_same_rows_are_compared():
    with pytest.raises(ValueError, match="same rows"):
        compare(["accuracy"], yes_no(2, 0), yes_no(1, 0), LABELS)


def test_without_resamples_there_are_no_intervals():
    scores = measure(["accuracy"], yes_no(3, 1), LABELS, num_resamples=0)
    assert (scores.score, scores.intervals, scores.score_interval) == (75.0, {}, None)


def test_one_answer_has_an_interval_of_one_point():
    assert measure(["accuracy"], yes_no(1, 0), LABELS).score_interval == (100.0, 100.0)


def test_invalid_answers_are_counted_most_frequent_first():
    texts = ["", "yes", "Yes", "", "yes ", "", "Yes", "no"]
    answers = [Answer(text, "yes") for text in texts]
    scores = measure(["f1", "accuracy"], answers, LABELS)
    assert list(scores.invalid.items()) == [("", 3), ("Yes", 2), ("yes ", 1)]
    assert scores.num_invalid == 6


def test_free_text_has_no_invalid_answers():
    assert measure(["squad"], answers_for("squad", 20)).num_invalid == 0
    assert measure(["accuracy"], [Answer("x", "y")]).num_invalid == 0
