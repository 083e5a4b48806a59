"""The Winograd schema challenge as T5 asks it: name the referent, then see if it is the one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.metric import Metric, Weighted, fact, weighted_mean

_DETERMINERS = frozenset(
    ("a", "an", "the", "this", "that", "these", "those", "which", "whose")
    + ("my", "your", "his", "her", "our", "their")
    + ("each", "every", "few", "many", "much", "some")
)
_NO_ANSWER = -1


def judge_referent(prediction: str, referent: str) -> int:
    """1 where `prediction` names `referent`, 0 where it does not, -1 where it names nothing.

    One names the other when its words are a subset of the other's, without regard to case and
    determiners; where only one has an apostrophe they differ. T5's `wsc_simple`.
    """
    predicted, right = _essence(prediction), _essence(referent)
    if not predicted:
        return _NO_ANSWER
    if ("'" in predicted) != ("'" in right):
        return 0
    predicted_words, right_words = set(predicted.split(" ")), set(right.split(" "))
    return int(predicted_words <= right_words or right_words <= predicted_words)


def _essence(text: str) -> str:
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if word not in _DETERMINERS)


def _accuracy(answers: Sequence[Answer], _: Sequence[str]) -> Weighted:
    mean = weighted_mean(np.array([float(_is_right(answer)) for answer in answers]))
    return lambda weights_RA: {"accuracy": 100 * mean(weights_RA)}


def _is_right(answer: Answer) -> bool:
    label = int(fact(answer, "label", "wsc"))
    return judge_referent(answer.prediction, answer.target) == label


def _names_nothing(answer: Answer, _: Sequence[str]) -> bool:
    return judge_referent(answer.prediction, answer.target) == _NO_ANSWER


WSC = Metric(
    "wsc",
    "share of rows where the answer names the referent exactly when it should",
    ("accuracy",),
    _accuracy,
    is_right=_is_right,
    is_invalid=_names_nothing,
    answer_kind="referent",
)
