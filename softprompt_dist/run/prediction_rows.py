"""The rows of a file of any length, window by window: examples, then tokens, with what is wrong.

Rank 0 alone reads: the file need not be on other nodes, is unpacked once, and no rank can have read
another one. What goes to the others is a window's token ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.data.batching import Tokenised
from softprompt_dist.data.examples import Example
from softprompt_dist.data.reading import TaskReader
from softprompt_dist.data.rows import NumberedRow, Place, stream_rows
from softprompt_dist.data.token_table import TokenTable
from softprompt_dist.errors import DataError

BLOCK_ROWS = 512
"""Rows that are sorted by length and batched together, counted from the file's first row.

The sums of a batch depend, in their last bits, on what is in it. As a batch never crosses a block,
neither the size of a window nor the row at which a killed run goes on changes any prediction.
"""

Encode = Callable[[Sequence[str]], Tokenised]


@dataclass(frozen=True)
class InputRow:
    """A row's examples, or why it has none."""

    where: Place
    examples: tuple[Example, ...] = ()
    """Empty, too, where the row belongs to another task (MRQA)."""
    error: str | None = None

    @property
    def number(self) -> int:
        """From 1."""
        return self.where.row


@dataclass(frozen=True)
class Window:
    """Consecutive rows and the token ids of their examples."""

    rows: tuple[InputRow, ...]
    sha256: str
    """Of the rows as they were read."""
    blocks: tuple[TokenTable, ...]
    """The examples of all rows in their order, those of each block of rows together."""

    @property
    def num_truncated(self) -> int:
        """How many inputs were longer than the limit and cut."""
        return sum(block.num_truncated for block in self.blocks)


class RowStream:
    """The rows of a jsonl, csv or parquet file, one after another, never all in memory."""

    def __init__(self, path: Path, reader: TaskReader) -> None:
        """Open the file.

        Raises:
            DataError: it is missing or of another kind.
        """
        rows = stream_rows(path)
        self._rows: Iterator[InputRow] = (_read(numbered, reader) for numbered in rows)
        self.num_taken = 0
        """Number of the last row that was taken."""

    def take(self, count: int) -> list[InputRow]:
        """The next `count` rows, or as many as there are.

        Raises:
            DataError: the file cannot be read any further.
        """
        taken = list(itertools.islice(self._rows, count))
        self.num_taken += len(taken)
        return taken

    def give_back(self, rows: Sequence[InputRow]) -> None:
        """Have the rows that were taken last taken again."""
        self._rows = itertools.chain(rows, self._rows)
        self.num_taken -= len(rows)

    def at_end(self) -> bool:
        """Whether there is no further row.

        Raises:
            DataError: the file cannot be read any further.
        """
        ahead = self.take(1)
        self.give_back(ahead)
        return not ahead


def rows_digest(rows: Iterable[InputRow]) -> str:
    """Hex sha256 of all that answers depend on: numbers, ids and texts, whatever the file format.

    Which rows are wrong counts, not how: messages name the file.
    """
    digest = hashlib.sha256()
    for row in rows:
        texts = None if row.error else [(e.id, e.input_text) for e in row.examples]
        digest.update(json.dumps([row.number, texts]).encode() + b"\n")
    return digest.hexdigest()


def tokenised_window(
    rows: Sequence[InputRow], encode: Encode, block_rows: int = BLOCK_ROWS
) -> Window:
    """Rows as token ids; those with a text that has no token become wrong ones.

    Args:
        rows: the first is the first of a block.
        encode: makes ids of input texts; raises DataError where a text has none.
        block_rows: how many are batched together.
    """
    done: list[InputRow] = []
    tables: list[TokenTable] = []
    for start in range(0, len(rows), block_rows):
        block, table = _tokenised(rows[start : start + block_rows], encode)
        done += block
        tables.append(table)
    return Window(tuple(done), rows_digest(rows), tuple(tables))


def _read(numbered: NumberedRow, reader: TaskReader) -> InputRow:
    if numbered.error is not None:
        return InputRow(numbered.where, error=numbered.error)
    try:
        return InputRow(numbered.where, tuple(reader.read_input(numbered.row, numbered.where)))
    except DataError as error:
        return InputRow(numbered.where, error=str(error))


def _tokenised(block: Sequence[InputRow], encode: Encode) -> tuple[list[InputRow], TokenTable]:
    try:
        return list(block), _table(block, encode)
    except DataError:
        checked = [_with_tokens(row, encode) for row in block]
        return checked, _table(checked, encode)


def _with_tokens(row: InputRow, encode: Encode) -> InputRow:
    try:
        _table([row], encode)
    except DataError as error:
        return dataclasses.replace(row, examples=(), error=f"{row.where}: {error}")
    return row


def _table(rows: Iterable[InputRow], encode: Encode) -> TokenTable:
    tokens = encode([example.input_text for row in rows for example in row.examples])
    return TokenTable.of(tokens.examples, tokens.num_truncated)
