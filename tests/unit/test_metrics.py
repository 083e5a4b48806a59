"""Metrics against the libraries that T5 computes them with, on answers of every kind."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.answer_text import translate
from softprompt_dist.metrics.correlation import string_to_float
from softprompt_dist.metrics.registry import METRICS, find_metrics
from softprompt_dist.metrics.scores import measure
from tests.answers import LABELS, answers_for, labels_for


@pytest.mark.parametrize("name", METRICS)
def test_a_weight_is_a_repetition(name):
    """So a resample's value is what the metric gives for the answers that were drawn."""
    answers, labels = answers_for(name, 24), labels_for(name)
    groups = np.random.default_rng(0).integers(0, 3, size=8)
    weights_A = np.repeat(groups, 3)
    repeated = []
    for copy in range(3):
        for answer, weight in zip(answers, weights_A, strict=True):
            if weight > copy:
                facts = {**answer.facts, "group": f"{copy} {answer.facts['group']}"}
                repeated.append(Answer(answer.prediction, answer.target, facts))
    weighted = METRICS[name].prepare(answers, labels)(weights_A[None].astype(float))
    expected = measure([name], repeated, labels, num_resamples=0).values
    assert {key: value[0] for key, value in weighted.items()} == pytest.approx(expected)
    assert tuple(weighted) == METRICS[name].gives


@pytest.mark.parametrize("seed", range(5))
def test_classes_as_scikit_learn_has_them(seed):
    answers = answers_for("macro_f1", 60, seed)
    texts = ([a.target for a in answers], [a.prediction for a in answers])
    values = measure(
        ["macro_f1", "accuracy", "matthews_corrcoef"], answers, LABELS, num_resamples=0
    ).values
    macro = sklearn.metrics.f1_score(*texts, labels=LABELS, average="macro", zero_division=0)
    assert values == pytest.approx(
        {
            "macro_f1": 100 * macro,
            "accuracy": 100 * sklearn.metrics.accuracy_score(*texts),
            "matthews_corrcoef": 100 * sklearn.metrics.matthews_corrcoef(*texts),
        }
    )


@pytest.mark.parametrize("seed", range(5))
def test_correlations_as_scipy_has_them(seed):
    answers = answers_for("pearson_corrcoef", 40, seed)
    numbers = [
        [string_to_float(a.target) for a in answers],
        [string_to_float(a.prediction) for a in answers],
    ]
    values = measure(["pearson_corrcoef", "spearman_corrcoef"], answers, num_resamples=0).values
    assert values == pytest.approx(
        {
            "pearson_corrcoef": 100 * scipy.stats.pearsonr(*numbers)[0],
            "spearman_corrcoef": 100 * scipy.stats.spearmanr(*numbers)[0],
        }
    )


@pytest.mark.parametrize("name", ["pearson_corrcoef", "spearman_corrcoef"])
@pytest.mark.parametrize("constant", ["3.3", "not a number"])
def test_a_constant_correlates_with_nothing(name, constant):
    answers = [Answer(constant, f"{0.1 * i}") for i in range(7)]
    scores = measure([name], answers)
    assert (scores.score, scores.score_interval) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999"])
def test_a_number_that_is_none_counts_as_unreadable(text):
    assert string_to_float(text) == -1.0
    assert measure(["pearson_corrcoef"], [Answer(text, "1"), Answer("2", "2")]).num_invalid == 1


def test_an_invalid_answer_counts_as_the_wrong_label_in_f1():
    answers = [Answer("yes", "yes"), Answer("", "yes"), Answer("", "no"), Answer("no", "no")]
    labels = LABELS[:2]
    assert measure(["f1"], answers, labels).values == {"f1": pytest.approx(50.0)}
    right = [Answer("yes", "yes"), Answer("no", "yes"), Answer("yes", "no"), Answer("no", "no")]
    assert measure(["f1"], right, labels).values == measure(["f1"], answers, labels).values


def test_the_order_of_labels_names_the_positive_one():
    answers = [Answer("yes", "yes"), Answer("yes", "no"), Answer("no", "no"), Answer("no", "no")]
    assert measure(["f1"], answers, ("no", "yes")).score == pytest.approx(100 * 2 / 3)
    assert measure(["f1"], answers, ("yes", "no")).score == pytest.approx(80.0)


@pytest.mark.parametrize("metric", ["record", "multirc", "wsc", "squad"])
def test_a_missing_fact_is_named(metric):
    with pytest.raises(DataError, match=rf"metric {metric} needs the fact '\w+'.*has other"):
        measure([metric], [Answer("no", "no", {"other": 1})], labels_for(metric))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro_f1", "matthews_corrcoef", "multirc"])
def test_a_target_that_is_no_label_is_refused(metric):
    answers = [Answer("no", "no", {"group": "0"}), Answer("no", "<unk>", {"group": "0"})]
    with pytest.raises(DataError, match=r"'<unk>' is none of the labels 'no', 'yes'.*split"):
        measure([metric], answers, LABELS[:2])


def test_no_answers_are_refused():
    with pytest.raises(DataError, match="no answers"):
        measure(["accuracy"], [])


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["Accuracy"], None, "no metric 'Accuracy'. Did you mean 'accuracy'"),
        (["zzz"], None, "no metric 'zzz'. Known: accuracy, f1"),
        ([], None, "at least one metric"),
        (["f1", "squad"], None, "f1, squad give f1 more than once"),
        (["f1"], LABELS, "f1 needs a task with exactly two labels, but this one has 3"),
        (["macro_f1"], (), "macro_f1 needs a task with labels, but this one has 0"),
    ],
)
def test_metrics_that_a_task_cannot_have(names, labels, message):
    with pytest.raises(ConfigError, match=message):
        find_metrics(names, labels)


def test_a_metric_named_twice_is_taken_once():
    assert [m.name for m in find_metrics(["accuracy", "f1", "accuracy"])] == ["accuracy", "f1"]


def test_a_translation_does_not_translate_itself():
    meanings = {"yes": "no", "no": "yes", "not yes": "never"}
    assert translate("yes, no, not yes", meanings) == "no, yes, never"
    assert translate("(a.b)", {"a.b": r"\1"}) == r"(\1)"
    assert translate("axb", {"a.b": "c"}) == "axb"
    assert translate("same", {}) == "same"
