"""What a metric is: a function of how often each answer counts.

Counting every answer once gives the metric's value; counting each as often as chance drew it gives
the value of a bootstrap resample. Whatever is costly is done once for each answer, before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softprompt_dist.errors import DataError
from softprompt_dist.metrics.answer import Answer

# A answers, C classes, R resamples, S statistics
Floats = NDArray[np.float64]
Weighted = Callable[[Floats], Mapping[str, Floats]]
"""weights_RA -> name of a value -> values_R in percent."""
Prepare = Callable[[Sequence[Answer], Sequence[str]], Weighted]
"""(answers, labels) -> the metric as a function of weights."""


@dataclass(frozen=True)
class Metric:
    """A way to judge answers, by name; all its values are in percent."""

    name: str
    title: str
    """One line: what is compared."""
    gives: tuple[str, ...]
    """Names of its values."""
    prepare: Prepare
    labels: Literal["unused", "any", "needed", "two"] = "unused"
    """Whether the task must have a label set."""
    grouped: bool = False
    """Whether answers with the same facts['group'] are judged together."""
    is_right: Callable[[Answer], bool] | None = None
    """Whether a prediction alone is right; None where it is only nearer or farther."""
    is_invalid: Callable[[Answer, Sequence[str]], bool] | None = None
    """Whether a prediction is no answer at all, such as a string outside the label set."""
    answer_kind: str = "label"
    """What an invalid prediction is not."""


def outside_labels(answer: Answer, labels: Sequence[str]) -> bool:
    """Whether the prediction is none of `labels`, to the character; never without labels."""
    return bool(labels) and answer.prediction not in labels


def equals_target(answer: Answer) -> bool:
    """Whether the prediction is the target, to the character."""
    return answer.prediction == answer.target


def fact(answer: Answer, name: str, metric: str) -> Any:
    """A fact that `metric` needs of an answer.

    Raises:
        DataError: the example does not have it.
    """
    if name not in answer.facts:
        known = ", ".join(answer.facts) or "none"
        raise DataError(
            f"The metric {metric} needs the fact {name!r} of every example, but the one with the "
            f"target {answer.target!r} has {known}. Use it with a task of the catalogue that gives "
            f"{name!r}, or choose another metric."
        )
    return answer.facts[name]


def weighted_mean(values_A: Floats) -> Callable[[Floats], Floats]:
    """Mean of a value of each answer, as a function of weights."""

    def mean(weights_RA: Floats) -> Floats:
        return weights_RA @ values_A / weights_RA.sum(axis=1)

    return mean


def ratio(numerator_R: Floats, denominator_R: Floats) -> Floats:
    """Their quotient; 0 where there is nothing to divide by (as scikit-learn has it)."""
    zero_R = np.zeros_like(numerator_R, dtype=np.float64)
    return np.divide(numerator_R, denominator_R, out=zero_R, where=denominator_R != 0)
