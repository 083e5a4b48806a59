"""WSC and DPR: the pronoun in question is starred, the target is what it refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator

from softprompt_dist.data.catalogue.definition import UNLABELLED, Row
from softprompt_dist.data.catalogue.fields import Labels, number, section, text, texts, truth
from softprompt_dist.data.examples import Example

_TRUTH = truth()
_CANDIDATES = Labels(("0", "1"))

_SPLIT_SUBJECTS = ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin")
"""Spans of WSC that stand apart in the text: nothing can repair them (tensorflow-datasets)."""

# Two texts whose word counts miss the pronoun; T5 has them by heart, the first shorn of its end.
_PONY = (
    "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out "
    'quite loud. "Good for him," he said. '
)
_PEBBLE = (
    "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic "
    "pebble in an iron safe . Some day they might want to use it , but really for now, what more "
    "could they wish for?"
)
_BLANKED = {
    _PONY: _PONY.replace("for him,", "for X ,").rstrip(),
    _PEBBLE: _PEBBLE.replace("use it ,", "use X ,"),
}


def wsc(row: Row, for_training: bool) -> Iterator[Example]:
    """The referent asked about, right or wrong; training leaves out the wrong. `label` is 0 or 1.

    The label is -1 where the row has none. Spans may be below `target` (official) or not (hub).

    Raises:
        ValueError: a field is missing, or the pronoun is not where the row says.
    """
    label = {"False": 0, "True": 1, UNLABELLED: -1}[_TRUTH.target(row)]
    if for_training and label == 0:
        return
    passage, spans = text(row, "text"), section(row, "target") if "target" in row else row
    referent, pronoun = (_span(passage, spans, name) for name in ("span1", "span2"))
    blanked = _BLANKED.get(passage) or _blanked(passage, number(spans, "span2_index"), pronoun)
    yield Example(blanked.replace(" X ", f" *{pronoun}* "), referent, facts={"label": label})


def _span(passage: str, spans: Row, name: str) -> str:
    """The span's text, made to occur in the passage as tensorflow-datasets' `wsc.fixed` does."""
    span, words = text(spans, f"{name}_text"), passage.split()
    if span in passage or span in _SPLIT_SUBJECTS:
        return span
    index = number(spans, f"{name}_index")
    if index < len(words):
        case = str.lower if words[index][0].islower() else str.upper
        repaired = (case(span[0]) + span[1:]).rstrip(".").replace("\n", " ")
        if repaired in passage:
            return repaired
    raise ValueError(f"field '{name}_text' is {span!r}; a part of 'text' is expected there")


def _blanked(passage: str, index: int, pronoun: str) -> str:
    words = passage.split(" ")
    if not 0 < index < len(words) or words[index] != pronoun:
        raise ValueError(
            f"field 'span2_index' is {index}; the number of the word {pronoun!r} is expected: "
            f"words are parted by single spaces and counted from 0, and the first will not do"
        )
    return " ".join([" ".join(words[:index]), "X", " ".join(words[index + 1 :])])


def dpr(row: Row, for_training: bool) -> Iterator[Example]:
    """The right one of two candidates; the pronoun's first occurrence is the one in question.

    Raises:
        ValueError: a field is missing or of a wrong kind.
    """
    candidates, pronoun = texts(row, "candidates"), text(row, "pronoun")
    if len(candidates) != 2:
        raise ValueError(f"field 'candidates' is {candidates!r}; two texts are expected there")
    label = _CANDIDATES.target(row)
    pattern = rf" ({re.escape(pronoun)})([ .,])"
    starred = re.sub(pattern, r" *\1*\2", text(row, "sentence"), count=1)
    yield Example(starred, label if label == UNLABELLED else candidates[int(label)])
