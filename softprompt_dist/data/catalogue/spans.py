"""SQuAD and the sets of MRQA: the answer is a span of the context."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

from softprompt_dist.data.catalogue.definition import UNLABELLED, Row
from softprompt_dist.data.catalogue.fields import find, section, sections, text, texts
from softprompt_dist.data.examples import Example

_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
_SPACES = re.compile(r"[\t\n\f\r ]+")  # what RE2, and so T5, takes for \s


def squad(row: Row, for_training: bool) -> Iterator[Example]:
    """Question, context and the first answer, punctuation set apart; `answers` are all of them.

    Raises:
        ValueError: a field is missing or of a wrong kind.
    """
    question, context = _set_apart(text(row, "question")), _set_apart(text(row, "context"))
    given = texts(row, "answers", "detected_answers", optional=True)
    answers = [_set_apart(answer) for answer in given]
    yield Example(
        _SPACES.sub(" ", f"question: {question} context: {context}"),
        answers[0] if answers else UNLABELLED,
        facts={"answers": answers},
    )


@dataclass(frozen=True)
class Mrqa:
    """One set of MRQA: rows of other sets, in the same file or hub split, give nothing.

    A row is one question (hub) or a context with its `qas`, after a first line `header` (official).
    """

    subset: str
    """Its name in the field `subset`, or in the header."""

    def __call__(self, row: Row, for_training: bool) -> Iterator[Example]:
        """The row's examples.

        Raises:
            ValueError: a field is missing or of a wrong kind, or the file is another set's.
        """
        if "header" in row:
            self._check_header(section(row, "header"))
        elif find(row, "subset") in (None, self.subset):
            for flat in _questions(row) if "qas" in row else [row]:
                yield from squad(flat, for_training)

    def _check_header(self, header: Row) -> None:
        named = header.get("dataset", self.subset)
        if named != self.subset:
            raise ValueError(f"the header says {named!r}; the set {self.subset!r} is expected")


def _questions(row: Row) -> Iterator[dict[str, object]]:
    for question in sections(row, "qas"):
        yield {**question, "context": text(row, "context")}


def _set_apart(written: str) -> str:
    """Spaces around ASCII punctuation, and no more than one space anywhere."""
    return _SPACES.sub(" ", _PUNCTUATION.sub(r" \1 ", written))
