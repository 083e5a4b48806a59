"""What every kind of task makes of a row, and how a row that cannot be used says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from softprompt_dist.data.examples import Example
from softprompt_dist.data.rows import Place, Row, listed, nearest
from softprompt_dist.errors import DataError


class NoLabelError(DataError):
    """A row is as it must be, but has no label."""


@dataclass(frozen=True)
class ReadRow:
    """A row's examples for scoring, and what decides where they go."""

    examples: tuple[Example, ...]
    split_text: str
    """Rows of equal text go to the same split, where splits are made by hash."""
    row_id: str | None
    """The row's own id, which no other may have, if it has one."""


class TaskReader(Protocol):
    """Rows to examples: a catalogue's task or a user's own."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct target texts; none for free text."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of `softprompt_dist.metrics`."""

    @property
    def family(self) -> str:
        """What kind of answer a prompt for it gives."""

    def read(self, row: Row, where: Place) -> ReadRow:
        """The row's labelled examples.

        Raises:
            DataError: what the row lacks; a `NoLabelError` if it is the label alone.
        """

    def training_examples(self, row: Row, where: Place, read: ReadRow) -> tuple[Example, ...]:
        """The row's examples to train on, where `read` is what it gives for scoring."""

    def read_input(self, row: Row, where: Place) -> list[Example]:
        """The row's examples, with an empty target where it has no label.

        Raises:
            DataError: what the row lacks besides a label.
        """


def value_of(row: Row, field: str, where: Place) -> object:
    """A field that must be there and be no list, mapping or bytes; NaN is pandas' null.

    Raises:
        DataError: it is not.
    """
    if field not in row:
        raise DataError(
            f"{where} has no field {field!r}.{nearest(field, row)} Its fields: {listed(row)}."
        )
    value = row[field]
    if isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"{where}: field {field!r} is a {type(value).__name__}; templates and labels take "
            f"text, numbers and true/false. Flatten it first."
        )
    return None if isinstance(value, float) and math.isnan(value) else value


def as_text(value: object) -> str:
    """A value as labels and templates have it: null is empty, true and false as in JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def check_unicode(text: str, where: Place) -> None:
    """Refuse what cannot be written as UTF-8.

    Raises:
        DataError: half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a character: {error}. Correct or remove it.") from error
