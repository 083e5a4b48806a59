"""Metrics against what T5's own postprocessors and metrics gave."""

import json
from pathlib import Path

import pytest

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.answer_text import remove_first_sentinel, translate
from softprompt_dist.metrics.classes import INVALID, class_scores, confusion_counts
from softprompt_dist.metrics.correlation import string_to_float
from softprompt_dist.metrics.questions import best_match, normalize_squad, normalize_trivia_qa
from softprompt_dist.metrics.referent import judge_referent
from softprompt_dist.metrics.scores import measure

DATA = Path(__file__).parent / "data" / "metrics"
METRICS_OF = {
    "glue_cola_v002": ("matthews_corrcoef",),
    "glue_mrpc_v002": ("f1", "accuracy"),
    "glue_qqp_v002": ("f1", "accuracy"),
    "super_glue_cb_v102": ("mean_3class_f1", "accuracy"),
    "glue_mrpc_from_qqp_v002_examples": ("f1", "accuracy"),
    "glue_qqp_from_mrpc_v002_examples": ("f1", "accuracy"),
}
"""Any other task of labels: accuracy."""


def cases(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if line]
    assert found
    return found


def named(name):
    return [pytest.param(c, id=f"{c['task']}-{c['case']}") for c in cases(name)]


def values(names, answers, labels=()):
    return measure(names, answers, labels, num_resamples=0).values


def expected(case):
    return pytest.approx(case["expected"], abs=1e-6, rel=0)


def answers_of(case):
    return list(map(Answer, case["predictions"], case["targets"]))


@pytest.mark.parametrize("case", named("classification"))
def test_labels(case):
    names = METRICS_OF.get(case["task"], ("accuracy",))
    labels = case["label_classes"]
    scores = measure(names, answers_of(case), labels, num_resamples=0)
    assert scores.values == expected(case)
    assert scores.num_invalid == case["prediction_ids"].count(-1)


@pytest.mark.parametrize("case", named("multirc"))
def test_multirc(case):
    groups = [{"group": str(post["group"])} for post in case["post_targets"]]
    answers = list(map(Answer, case["predictions"], case["targets"], groups))
    scores = measure(["multirc"], answers, ["False", "True"], num_resamples=0)
    assert scores.values == expected(case)
    assert scores.num_invalid == sum(post["value"] == -1 for post in case["post_predictions"])


@pytest.mark.parametrize("case", named("record"))
def test_record(case):
    facts = [
        {"group": str(post["group"]), "answers": post["value"]} for post in case["post_targets"]
    ]
    answers = list(map(Answer, case["predictions"], case["targets"], facts))
    assert values(["record"], answers) == expected(case)


@pytest.mark.parametrize("case", named("squad"))
def test_squad(case):
    answers = [
        Answer(prediction, rights[0], {"answers": rights})
        for prediction, rights in zip(case["predictions"], case["answers"], strict=True)
    ]
    assert values(["squad"], answers) == expected(case)
    for answer, each in zip(answers, case["per_example"], strict=True):
        em, f1 = best_match(answer.prediction, answer.facts["answers"], normalize_squad)
        assert (100 * em, 100 * f1) == pytest.approx((each["em"], each["f1"]), abs=1e-6)


@pytest.mark.parametrize("case", named("stsb"))
def test_stsb(case):
    assert list(map(string_to_float, case["predictions"])) == case["prediction_values"]
    names = ["pearson_corrcoef", "spearman_corrcoef"]
    assert values(names, answers_of(case)) == expected(case)


@pytest.mark.parametrize("case", named("wsc"))
def test_wsc(case):
    answers = [
        Answer(prediction, referent, {"label": label})
        for prediction, referent, label in zip(
            case["predictions"], case["referents"], case["labels"], strict=True
        )
    ]
    judged = [judge_referent(answer.prediction, answer.target) for answer in answers]
    assert judged == case["post_predictions"]
    scores = measure(["wsc"], answers, num_resamples=0)
    assert scores.values == expected(case)
    assert scores.num_invalid == judged.count(-1)


def test_referent_rule():
    for case in cases("wsc_postprocess"):
        assert judge_referent(case["prediction"], case["referent"]) == case["result"], case


def test_normalized_questions():
    for case in cases("qa_normalize"):
        assert normalize_squad(case["text"]) == case["normalize_squad"]
        assert normalize_trivia_qa(case["text"]) == case["normalize_trivia_qa"]


def test_numbers_in_text():
    for case in cases("string_to_float"):
        assert string_to_float(case["text"]) == case["result"]


def test_first_sentinel_is_removed():
    for case in cases("remove_extra_id_0"):
        assert remove_first_sentinel(case["text"]) == case["result"]


@pytest.mark.parametrize("case", cases("qqp_mrpc_transfer"), ids=lambda case: case["task"])
def test_transfer_between_qqp_and_mrpc(case):
    pair = ("duplicate", "equivalent")
    there, here = pair if "mrpc_from_qqp" in case["task"] else pair[::-1]
    translated = [translate(prediction, {there: here}) for prediction in case["predictions"]]
    assert translated == case["translated"]
    both = {there: here, f"not_{there}": f"not_{here}"}
    assert [translate(prediction, both) for prediction in case["predictions"]] == translated
    answers = list(map(Answer, translated, case["targets"]))
    labels = [f"not_{here}", here]
    assert values(METRICS_OF[case["task"]], answers, labels) == expected(case)


def shown_distributions(answers, labels):
    """How often each text was target and prediction, as reports show it: classes, invalid texts."""
    classes = class_scores(confusion_counts(answers, labels), labels)
    known = [each for each in classes if each.label != INVALID]
    predictions = {each.label: each.num_predictions for each in known if each.num_predictions}
    predictions |= measure(["accuracy"], answers, labels, num_resamples=0).invalid
    return {each.label: each.num_targets for each in known if each.num_targets}, predictions


@pytest.mark.parametrize("case", cases("label_set_stats"))
def test_distributions_of_labels(case):
    stats = case["expected"]["cb label distributions"].strip("`\n")
    targets, predictions = shown_distributions(answers_of(case), sorted(set(case["targets"])))
    for kind, counts in (("target", targets), ("prediction", predictions)):
        original = json.loads(stats)[f"{kind} label distribution"]
        total = len(case["targets"]) if case["normalize"] else 1
        assert {label: count / total for label, count in counts.items()} == original
    lines = case["expected"]["cb label stats"].split("\n\n")
    assert [int(line.rsplit(": ", 1)[1]) for line in lines] == [
        len(targets),
        len(predictions),
        len(targets.keys() & predictions.keys()),
        len(targets.keys() - predictions.keys()),
        len(predictions.keys() - targets.keys()),
    ]
