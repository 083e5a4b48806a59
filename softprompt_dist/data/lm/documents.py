"""Rows of a source to documents: which are text, which are empty, which are neither."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from softprompt_dist.untrusted import RepeatedKeyError, object_of

RowFormat = Literal["line", "json", "value"]

_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f]")
_FIELDS_SHOWN = 8


@dataclass(frozen=True)
class RawRows:
    """Rows that follow one another in a source, as they were read."""

    source: int
    """Which of the sources."""
    first_row: int
    """Its number in the source, from 1; every line counts."""
    values: list[Any]
    """line, json: bytes of a line; value: what a column of the data set holds."""
    format: RowFormat
    field_name: str
    """Of the text, where rows have fields."""
    fields_instead: tuple[str, ...] | None = None
    """The columns of the rows, where the one of the text is not among them."""
    position: int = 0
    """Bytes of the source up to here, packed ones where it is packed."""


class BadRow(NamedTuple):
    """A row that is no document."""

    row: int
    reason: str
    """Goes on after `Line 3 of a.txt `."""


@dataclass(frozen=True)
class Documents:
    """What the rows hold."""

    texts: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """The row of each text."""
    empty_rows: list[int] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)


class _NotADocumentError(ValueError):
    """The message is the reason."""


def documents_of(raw: RawRows) -> Documents:
    """The texts of all rows that have one."""
    found = Documents()
    text_of = _READERS[raw.format]
    for row, value in enumerate(raw.values, raw.first_row):
        try:
            if raw.fields_instead is not None:
                raise _NotADocumentError(_lacks(raw.field_name, raw.fields_instead))
            text = text_of(value, raw.field_name)
            _check(text)
        except _NotADocumentError as error:
            found.bad_rows.append(BadRow(row, str(error)))
            continue
        if text and not text.isspace():
            found.texts.append(text)
            found.rows.append(row)
        else:
            found.empty_rows.append(row)
    return found


def _check(text: str) -> None:
    num_control = len(_CONTROL.findall(text))
    if num_control and ("\0" in text or 2 * num_control > len(text)):
        raise _NotADocumentError(
            f"is binary: {num_control} of its {len(text)} characters are control characters"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _NotADocumentError(f"has half a character at position {error.start}") from error


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        found = line[error.start]
        raise _NotADocumentError(
            f"is not UTF-8: byte 0x{found:02x} at position {error.start}"
        ) from error


def _text_of_line(line: bytes, _: str) -> str:
    return _decoded(line.rstrip(b"\r\n"))


def _text_of_json(line: bytes, field_name: str) -> str:
    if not line.strip():
        return ""
    text = _decoded(line)
    try:
        row = json.loads(text, object_pairs_hook=object_of)
    except RepeatedKeyError as error:
        raise _NotADocumentError(f"cannot be used: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _NotADocumentError(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _NotADocumentError(f"is not a JSON object of fields but a {type(row).__name__}")
    if field_name not in row:
        raise _NotADocumentError(_lacks(field_name, row))
    return _text_of_value(row[field_name], field_name)


def _text_of_value(value: Any, field_name: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise _NotADocumentError(f"has no text in its field {field_name!r} but {kind}")
    return value


def _lacks(field_name: str, fields: Mapping[str, Any] | tuple[str, ...]) -> str:
    names = [*fields][:_FIELDS_SHOWN] + (["..."] if len(fields) > _FIELDS_SHOWN else [])
    return f"has no field {field_name!r} (its fields: {', '.join(names)}; --field names the text's)"


_READERS: dict[RowFormat, Callable[[Any, str], str]] = {
    "line": _text_of_line,
    "json": _text_of_json,
    "value": _text_of_value,
}
