"""MultiRC and ReCoRD: several examples a passage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from softprompt_dist.data.catalogue.definition import UNLABELLED, Row
from softprompt_dist.data.catalogue.fields import (
    KeyedText,
    number,
    section,
    sections,
    text,
    texts,
    truth,
)
from softprompt_dist.data.examples import Example

_MULTIRC = KeyedText((("question",), ("answer",), ("paragraph",)), truth())
_HIGHLIGHT = "\n@highlight\n"


def multirc(row: Row, for_training: bool) -> Iterator[Example]:
    """One example for each answer: is it true? `group` names the question.

    The row is a passage with its questions (official) or one answer (hub).

    Raises:
        ValueError: a field is missing or of a wrong kind.
    """
    for flat in _answers(row) if "passage" in row else [row]:
        index = section(flat, "idx")
        written = _MULTIRC.written(flat).replace("<br>", " ")
        group = f"{number(index, 'paragraph')}-{number(index, 'question')}"
        yield Example(
            re.sub("</?b>", "", written), _MULTIRC.labels.target(flat), facts={"group": group}
        )


def _answers(row: Row) -> Iterator[dict[str, Any]]:
    passage = section(row, "passage")
    for question in sections(passage, "questions"):
        index = {"paragraph": number(row, "idx"), "question": number(question, "idx")}
        for answer in sections(question, "answers"):
            yield {
                "paragraph": text(passage, "text"),
                "question": text(question, "question"),
                "answer": text(answer, "text"),
                "label": answer.get("label"),
                "idx": index,
            }


def record(row: Row, for_training: bool) -> Iterator[Example]:
    """One example for each right entity, or `<unk>` where none is known; `group` names the query.

    The row is a passage with its queries (official) or one query (hub).

    Raises:
        ValueError: a field is missing or of a wrong kind.
    """
    for flat in _queries(row) if "qas" in row else [row]:
        index = section(flat, "idx")
        # Sorted and each once, as in tensorflow-datasets: the hub's rows come in any order.
        entities = sorted(set(texts(flat, "entities")))
        answers = sorted(set(texts(flat, "answers", optional=True)))
        written = (
            f"query: {text(flat, 'query')} entities: {', '.join(entities)} "
            f"passage: {_without_highlights(text(flat, 'passage'))}"
        )
        group = f"{number(index, 'passage')}-{number(index, 'query')}"
        for answer in answers or [UNLABELLED]:
            yield Example(written, answer, facts={"group": group, "answers": answers})


def _queries(row: Row) -> Iterator[dict[str, Any]]:
    passage = section(row, "passage")
    written = text(passage, "text")
    entities = [_span(written, entity) for entity in sections(passage, "entities")]
    for query in sections(row, "qas"):
        yield {
            "passage": written,
            "query": text(query, "query"),
            "entities": entities,
            "answers": texts(query, "answers", optional=True),
            "idx": {"passage": number(row, "idx"), "query": number(query, "idx")},
        }


def _span(passage: str, entity: Mapping[str, Any]) -> str:
    """Both ends belong to the entity."""
    return passage[number(entity, "start") : number(entity, "end") + 1]


def _without_highlights(passage: str) -> str:
    """Highlights become sentences of the passage, with a full stop where they lack an end."""
    ended = re.sub(rf"([.?!\"']){_HIGHLIGHT}", r"\1 ", passage)
    return ended.replace(_HIGHLIGHT, ". ")
