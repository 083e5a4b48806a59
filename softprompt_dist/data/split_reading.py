"""Reads one split of a source whole: its rows placed by hash, bad ones counted and named."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from softprompt_dist.data.examples import Example
from softprompt_dist.data.reading import NoLabelError, ReadRow, TaskReader
from softprompt_dist.data.rows import NumberedRow, Place
from softprompt_dist.data.sources import SplitSource
from softprompt_dist.errors import DataError
from softprompt_dist.progress import phase

log = logging.getLogger(__name__)

HASH_BUCKETS = {"test": 0, "validation": 1}
"""The bucket of ten that a split has where the source lacks it."""

_NUM_BUCKETS = 10
NUM_SHOWN = 5
"""Of the problems with rows, in messages and records."""
_NUM_WARNED = 3


@dataclass
class SplitContents:
    """What was read of one split of a source."""

    split: str
    source: SplitSource
    sha256: str | None
    num_rows: int = 0
    num_bad: int = 0
    num_unlabelled: int = 0
    """Of the bad rows."""
    bad: list[str] = field(default_factory=list)
    """What is wrong with the first of them."""
    placed: dict[str, list[tuple[str, tuple[Example, ...]]]] = field(default_factory=dict)
    """Split -> of each of its rows the text's sha256 and the examples, in the source's order."""

    def examples(self, split: str) -> tuple[Example, ...]:
        """The examples placed in `split`, those of a row together, in the order of the hashes."""
        rows = sorted(self.placed.get(split, ()), key=lambda row: row[0])
        return tuple(example for _, examples in rows for example in examples)

    def count_bad(self, error: DataError) -> None:
        """Take down a row that cannot be used."""
        self.num_bad += 1
        self.num_unlabelled += isinstance(error, NoLabelError)
        if len(self.bad) < NUM_SHOWN:
            self.bad.append(str(error))


def hash_split(text: str, absent: Sequence[str] = tuple(HASH_BUCKETS)) -> str:
    """The split of a row whose source lacks the splits `absent`, from the row's text alone.

    Bucket = first 32 bits of the sha256 of the UTF-8 text, modulo 10: 0 is test, 1 validation, the
    rest train. Equal texts share a split, whatever the order, the template or the rest of the data.
    """
    return _split_of(_sha256(text), absent)


def read_split(
    split: str,
    source: SplitSource,
    reader: TaskReader,
    *,
    absent: Sequence[str],
    asked: Collection[str],
) -> SplitContents:
    """All rows of a split; those of train that belong to the `absent` splits are placed there.

    Args:
        split: train, validation or test.
        source: where its rows are.
        reader: makes examples of them.
        absent: splits that the source lacks.
        asked: splits whose examples are wanted.

    Raises:
        DataError: the file cannot be read or is another one; bad rows are only counted.
    """
    rows = source.stream()
    contents = SplitContents(split, source, source.sha256())
    if source.expected_sha256 not in (None, contents.sha256):
        raise DataError(
            f"{source.origin} has sha256 {contents.sha256}, but task.source.sha256.{split} is "
            f"{source.expected_sha256}. Get the file that was meant, or correct the checksum."
        )
    seen: dict[str, Place] = {}
    with phase(f"reading the {split} split", unit="rows") as told:
        for numbered in rows:
            contents.num_rows += 1
            told.advance()
            try:
                read = _read_row(numbered, reader, seen)
                key = _sha256(read.split_text)
                goes_to = _split_of(key, absent) if split == "train" else split
                if read.examples and goes_to in asked:
                    examples = _examples_for(goes_to, numbered, reader, read)
                    contents.placed.setdefault(goes_to, []).append((key, examples))
            except DataError as error:
                contents.count_bad(error)
    return contents


def check_rows(all_contents: Collection[SplitContents], *, skip_bad_rows: bool) -> None:
    """Refuse bad rows, or warn where they are to be left out.

    Raises:
        DataError: all labels of a split are missing; or there are bad rows, which may not be left
            out or are all rows of a split.
    """
    for contents in all_contents:
        if contents.num_rows and contents.num_unlabelled == contents.num_rows:
            raise DataError(_no_labels(contents))
    bad = [contents for contents in all_contents if contents.num_bad]
    if bad and not skip_bad_rows:
        problems = [problem for contents in bad for problem in contents.bad]
        raise DataError(refusal(problems, sum(contents.num_bad for contents in bad)))
    for contents in bad:
        message = (
            f"{contents.num_bad} of {contents.num_rows} rows of {contents.source.origin} cannot be "
            f"used"
        )
        if contents.num_bad == contents.num_rows:
            raise DataError(f"{message}: {' '.join(contents.bad[:_NUM_WARNED])} Give other rows.")
        log.warning("%s and are left out: %s", message, " ".join(contents.bad[:_NUM_WARNED]))


def _read_row(numbered: NumberedRow, reader: TaskReader, seen: dict[str, Place]) -> ReadRow:
    if numbered.error is not None:
        raise DataError(numbered.error)
    read = reader.read(numbered.row, numbered.where)
    if read.row_id is not None:
        first, where = seen.setdefault(read.row_id, numbered.where), numbered.where
        if first is not where:
            raise DataError(
                f"id {read.row_id} stands in {where.unit}s {first.number} and {where.number} of "
                f"{where.origin}; ids must differ. Remove one of the rows or correct its id."
            )
    return read


def _examples_for(
    goes_to: str, numbered: NumberedRow, reader: TaskReader, read: ReadRow
) -> tuple[Example, ...]:
    if goes_to == "train":
        return reader.training_examples(numbered.row, numbered.where, read)
    return read.examples


def _split_of(sha256: str, absent: Sequence[str]) -> str:
    bucket = int(sha256[:8], 16) % _NUM_BUCKETS
    return next((split for split in absent if HASH_BUCKETS[split] == bucket), "train")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _no_labels(contents: SplitContents) -> str:
    split = contents.split
    public = " (the official test sets are published without)" if split == "test" else ""
    return (
        f"Split {split!r} has no labels: none of the {contents.num_rows} rows of "
        f"{contents.source.origin} has one{public}. Name labelled rows in task.source.{split}, or "
        f"ask for another split; `softprompt predict` answers rows without labels."
    )


def refusal(problems: Sequence[str], total: int) -> str:
    """Says the first of `total` problems with rows, and the ways out."""
    problems = problems[:NUM_SHOWN]
    if total == 1:
        return f"{problems[0]} Or leave it out with task.skip_bad_rows=true."
    more = [f"and {total - len(problems)} more."] if total > len(problems) else []
    lines = "".join(f"\n  {line}" for line in [*problems, *more])
    return (
        f"{total} rows cannot be used:{lines}\nCorrect them, or leave them out with "
        f"task.skip_bad_rows=true."
    )
