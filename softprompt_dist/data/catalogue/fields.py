"""A row's fields as text, numbers and labels; what is not so is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from softprompt_dist.data.catalogue.definition import UNLABELLED, Row
from softprompt_dist.data.examples import Example


def find(row: Row, *names: str) -> Any:
    """The value of the first of `names` that the row has, or None."""
    return next((row[name] for name in names if name in row), None)


def text(row: Row, *names: str) -> str:
    """The text of a field; `names` are its name and the others it may have.

    Raises:
        ValueError: the field is missing or is no text.
    """
    value = find(row, *names)
    if isinstance(value, str):
        return value
    found = next((name for name in names if name in row), None)
    if found is None:
        wanted = " or ".join(map(repr, names))
        raise ValueError(f"no field {wanted}; a text is expected there. Fields: {', '.join(row)}")
    raise ValueError(f"field {found!r} is {value!r}; a text is expected there")


def number(row: Row, name: str) -> int:
    """The whole number of a field.

    Raises:
        ValueError: the field is missing or is no whole number.
    """
    value = row.get(name)
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"field {name!r} is {value!r}; a whole number is expected there")
    return value


def section(row: Row, name: str) -> Mapping[str, Any]:
    """The object of a field.

    Raises:
        ValueError: the field is missing or is no object.
    """
    value = row.get(name)
    if not isinstance(value, Mapping):
        raise ValueError(f"field {name!r} is {value!r}; an object with fields is expected there")
    return value


def sections(row: Row, name: str) -> list[Mapping[str, Any]]:
    """The list of objects of a field.

    Raises:
        ValueError: the field is missing or is no such list.
    """
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"field {name!r} is {value!r}; a list of objects is expected there")
    return value


def texts(row: Row, *names: str, optional: bool = False) -> list[str]:
    """The texts of a field: a list of texts, of objects with `text`, or an object of lists.

    Where it is optional, empty if the row lacks the field or has null there.

    Raises:
        ValueError: the field is none of these.
    """
    value = find(row, *names)
    found = value["text"] if isinstance(value, Mapping) and "text" in value else value
    if found is None and optional:
        return []
    if isinstance(found, list):
        items = [item.get("text") if isinstance(item, Mapping) else item for item in found]
        written = [item for item in items if isinstance(item, str)]
        if len(written) == len(items):
            return written
    raise ValueError(
        f"field {names[0]!r} is {value!r}; a list of texts is expected there, or of objects with "
        f"'text'"
    )


@dataclass(frozen=True)
class Labels:
    """Target texts, and how rows write them: by number, by the text itself, or by another name."""

    targets: tuple[str, ...]
    """By number."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Other spellings -> target text."""
    fields: tuple[str, ...] = ("label",)
    """The label's field and the other names it may have."""

    def target(self, row: Row) -> str:
        """The row's target text; `<unk>` where it has no label, null, an empty one or -1 (T5).

        Raises:
            ValueError: the label is none of the known.
        """
        value = find(row, *self.fields)
        if value is None or (not isinstance(value, bool) and value in (-1, "-1", "")):
            return UNLABELLED
        known = {text: text for text in self.targets} | dict(self.names)
        known |= {str(index): text for index, text in enumerate(self.targets)}
        # str(true) is no digit: 1 and true are the same only where the targets are True and False.
        if isinstance(value, int | str) and str(value) in known:
            return known[str(value)]
        raise ValueError(
            f"field {self._found(row)!r} is {value!r}; one of {', '.join(self.targets)} is "
            f"expected there, or its number from 0"
        )

    def _found(self, row: Row) -> str:
        return next(name for name in self.fields if name in row)


def truth(*fields: str) -> Labels:
    """Labels False and True, which rows write as JSON's, as text, or as 0 and 1."""
    return Labels(("False", "True"), {"false": "False", "true": "True"}, fields or ("label",))


@dataclass(frozen=True)
class KeyedText:
    """`key: text` of each field, joined by spaces: T5's form for most tasks (its `glue`)."""

    keys: tuple[tuple[str, ...], ...]
    """In order; each is the key as written, then other names the row may have for it."""
    labels: Labels

    def __call__(self, row: Row, for_training: bool) -> Iterator[Example]:
        """The row's one example."""
        yield Example(self.written(row), self.labels.target(row))

    def written(self, row: Row) -> str:
        """The input text."""
        return " ".join(f"{names[0]}: {text(row, *names)}" for names in self.keys)
