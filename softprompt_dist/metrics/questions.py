"""Metrics of questions: several right texts, or several answers to one question."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.classification import f1_of_second_label
from softprompt_dist.metrics.metric import (
    Floats,
    Metric,
    Weighted,
    equals_target,
    fact,
    outside_labels,
    weighted_mean,
)

# A answers, R resamples
Normalize = Callable[[str], str]
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETED = str.maketrans("", "", string.punctuation)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`_", " "))


def normalize_squad(text: str) -> str:
    """Lower case; without ASCII punctuation, articles and further white space (SQuAD 1.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETED)).split())


def normalize_trivia_qa(text: str) -> str:
    """As `normalize_squad`, but punctuation and quotation marks become spaces (TriviaQA)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SPACED)).split())


def token_f1(right: str, predicted: str) -> float:
    """F1, in [0, 1], of two normalized texts as bags of words; 0 where they share none."""
    right_words, predicted_words = right.split(), predicted.split()
    shared = (Counter(right_words) & Counter(predicted_words)).total()
    return 2 * shared / (len(right_words) + len(predicted_words)) if shared else 0.0


def best_match(prediction: str, rights: Sequence[str], normalize: Normalize) -> tuple[float, float]:
    """Exact match and F1, in [0, 1], each with the right text that is best for it."""
    predicted = normalize(prediction)
    normalized = {normalize(right) for right in rights}
    best_f1 = max((token_f1(right, predicted) for right in normalized), default=0.0)
    return float(predicted in normalized), best_f1


def _matches(answers: Sequence[Answer], metric: str, normalize: Normalize) -> Floats:
    """Exact match and F1 in percent, [A, 2]."""
    rights = [fact(answer, "answers", metric) for answer in answers]
    matches = [
        best_match(answer.prediction, texts, normalize)
        for answer, texts in zip(answers, rights, strict=True)
    ]
    return 100 * np.array(matches)


def _question_metric(name: str, title: str, normalize: Normalize) -> Metric:
    def prepare(answers: Sequence[Answer], _: Sequence[str]) -> Weighted:
        em_A, f1_A = _matches(answers, name, normalize).T
        mean_em, mean_f1 = weighted_mean(em_A), weighted_mean(f1_A)
        return lambda weights_RA: {"em": mean_em(weights_RA), "f1": mean_f1(weights_RA)}

    def matches_exactly(answer: Answer) -> bool:
        return normalize(answer.prediction) in map(normalize, fact(answer, "answers", name))

    return Metric(name, title, ("em", "f1"), prepare, is_right=matches_exactly)


def _members(answers: Sequence[Answer], metric: str) -> list[list[int]]:
    """The answers of each group, groups in the order of their first answers."""
    members: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        members.setdefault(fact(answer, "group", metric), []).append(index)
    return list(members.values())


def _record(answers: Sequence[Answer], _: Sequence[str]) -> Weighted:
    """A query that gave several examples counts once, by the first (T5's `deduplicate_metric`)."""
    firsts = [members[0] for members in _members(answers, "record")]
    kept = _matches([answers[index] for index in firsts], "record", normalize_squad)
    mean_em, mean_f1 = weighted_mean(kept[:, 0]), weighted_mean(kept[:, 1])
    return lambda weights_RA: {
        "em": mean_em(weights_RA[:, firsts]),
        "f1": mean_f1(weights_RA[:, firsts]),
    }


def _multirc(answers: Sequence[Answer], labels: Sequence[str]) -> Weighted:
    """F1 over all answers, and the share of questions whose answers are all judged right.

    T5's `multirc_f1_over_all_answers` and `mean_group_metric(exact_match)`. Answers of one question
    must have equal weights, as whole questions are drawn.
    """
    f1 = f1_of_second_label(answers, labels)
    groups = _members(answers, "multirc")
    firsts = [members[0] for members in groups]
    right = [equals_target(answer) for answer in answers]
    exact = weighted_mean(np.array([float(all(right[i] for i in members)) for members in groups]))

    def values(weights_RA: Floats) -> Mapping[str, Floats]:
        return {**f1(weights_RA), "exact_match": 100 * exact(weights_RA[:, firsts])}

    return values


SQUAD = _question_metric(
    "squad", "exact match and F1 of words with the best of several right texts", normalize_squad
)
TRIVIA_QA = _question_metric(
    "trivia_qa", "as squad, with TriviaQA's treatment of punctuation", normalize_trivia_qa
)
RECORD = Metric(
    "record",
    "as squad, each query counted once",
    ("em", "f1"),
    _record,
    grouped=True,
    is_right=SQUAD.is_right,
)
MULTIRC = Metric(
    "multirc",
    "F1 of the second label over all answers; questions with every answer judged right",
    ("f1", "exact_match"),
    _multirc,
    labels="two",
    grouped=True,
    is_right=equals_target,
    is_invalid=outside_labels,
)
