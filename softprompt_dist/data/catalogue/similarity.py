"""STS-B: a similarity from 0 to 5 as text, one of 26."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

from softprompt_dist.data.catalogue.definition import UNLABELLED, Row
from softprompt_dist.data.catalogue.fields import KeyedText, Labels, find
from softprompt_dist.data.examples import Example

_TEXT = KeyedText((("sentence1",), ("sentence2",)), Labels(()))
_FIELDS = ("label", "score")
SCORES = tuple(f"{step / 5:.1f}" for step in range(26))
"""Every target of a row that has a score."""


def stsb(row: Row, for_training: bool) -> Iterator[Example]:
    """The score to the nearest 0.2, such as `3.8`; the hub's -1 is `-1.0` as in T5, `label` -1.

    Raises:
        ValueError: a field is missing, or the score is no number from 0 to 5.
    """
    score = _score(find(row, *_FIELDS))
    target = UNLABELLED if score is None else f"{round(_float32(_float32(score) * 5)) / 5:.1f}"
    yield Example(_TEXT.written(row), target, facts={"label": -1} if score == -1 else {})


def _score(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if score != -1 and not 0 <= score <= 5:
        raise ValueError(f"field 'label' is {value!r}; a number from 0 to 5 is expected there")
    return score


def _float32(value: float) -> float:
    """T5 computes in float32, where 0.3 * 5 is 1.5 and so rounds up to 0.4."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)
