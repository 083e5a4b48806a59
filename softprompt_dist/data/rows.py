"""Rows of .jsonl, .csv and .parquet files, one after another, each with its place in the file."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from softprompt_dist.errors import DataError
from softprompt_dist.untrusted import RepeatedKeyError, object_of, open_regular

Row = dict[str, Any]
OpenFile = Callable[[], IO[bytes]]

ROWS_AT_A_TIME = 1000
"""Rows of a columnar source that are in memory as Python's objects, ten times their size."""

LONGEST_ROW = 1 << 26
"""Characters of a line, and of a field of .csv: a packed file may be a thousand times its size."""
_NAMES_SHOWN = 30
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands; as text such as `Line 3 of train.jsonl` or `Row 3 of train.parquet`."""

    origin: str
    row: int
    """From 1; blank lines and a header do not count."""
    line: int | None = None
    """From 1, where the origin has lines: all of them count."""

    def __str__(self) -> str:
        """For messages."""
        return f"{self.unit.capitalize()} {self.number} of {self.origin}"

    @property
    def unit(self) -> str:
        """What `number` counts: line or row."""
        return "row" if self.line is None else "line"

    @property
    def number(self) -> int:
        """The line, else the row."""
        return self.row if self.line is None else self.line


@dataclass(frozen=True)
class NumberedRow:
    """A row, or what is wrong with it, and where it stands."""

    where: Place
    row: Row
    """Empty where there is an error."""
    error: str | None = None
    """Names the place, too."""

    @property
    def number(self) -> int:
        """The row's number, from 1; rows with an error count, blank lines do not."""
        return self.where.row


@dataclass(frozen=True)
class Rows:
    """All rows of one file and its name."""

    origin: str
    rows: list[Row]


def stream_rows(path: Path) -> Iterator[NumberedRow]:
    """Rows of a .jsonl, .csv (with a header) or .parquet file, the first two also .gz.

    The file is never whole in memory. A row that is wrong by itself comes with its error, and the
    rows behind it still come.

    Raises:
        DataError: at once, where the file is missing or of another kind; on the way, where it is
            not UTF-8 or cut off.
    """
    if not path.is_file():
        raise DataError(_missing_file(path))
    if Path(path.name.removesuffix(".gz")).suffix not in _FORMATS:
        raise DataError(f"{path} must end in {', '.join(_FORMATS)} (the first two also .gz).")
    return _stream(opener(path), path.name, str(path))


def stream_member(open_file: OpenFile, origin: str) -> Iterator[NumberedRow]:
    """Rows of what `open_file` opens, such as a file inside a zip; `origin` ends as its name does.

    Raises:
        DataError: on the way, where it is not UTF-8 or cut off.
    """
    return _stream(open_file, origin, origin)


def opener(path: Path) -> OpenFile:
    """What opens the file."""
    return lambda: open_regular(path)


def read_file(path: Path) -> Rows:
    """All rows of a file; see `stream_rows`.

    Raises:
        DataError: the file cannot be read, or a row of it.
    """
    rows = []
    for numbered in stream_rows(path):
        if numbered.error is not None:
            raise DataError(numbered.error)
        rows.append(numbered.row)
    return Rows(path.name, rows)


def sha256_of(open_file: OpenFile, shown: str) -> str:
    """Hex sha256 of what `open_file` opens.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    with _readable(shown), open_file() as file:
        while block := file.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def nearest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean ...?` with the valid name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Names for a message, which a file of any other kind may make thousands of, and long ones."""
    names = list(names)
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(f"{name:.80}" for name in names[:_NAMES_SHOWN]) + more


def _stream(open_file: OpenFile, origin: str, shown: str) -> Iterator[NumberedRow]:
    name = origin.removesuffix(".gz")
    with _readable(shown), open_file() as file:
        unpacked = cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if name != origin else file
        yield from _FORMATS[Path(name).suffix](unpacked, origin)


@contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{shown} must be UTF-8: {error}. Convert it, e.g. with iconv.") from error
    # RuntimeError: a zip with a password, or packed in a way that Python does not know.
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"Cannot read {shown}: {error}. Check that the file is whole.") from error


def _stream_jsonl(file: IO[bytes], origin: str) -> Iterator[NumberedRow]:
    number = 0
    for line_number, line in enumerate(_lines_of(file), 1):
        if line.strip():
            number += 1
            yield _json_row(Place(origin, number, line_number), line)


def _json_row(where: Place, line: str) -> NumberedRow:
    try:
        row = json.loads(line, object_pairs_hook=object_of)
    except RepeatedKeyError as error:
        return NumberedRow(where, {}, f"{where}: {error}. Correct or remove it.")
    except (ValueError, RecursionError) as error:
        return NumberedRow(where, {}, f"{where} is not JSON ({error}). Correct or remove it.")
    if not isinstance(row, dict):
        message = f"{where} is not a JSON object of fields but {line.strip()[:40]!r}."
        return NumberedRow(where, {}, f"{message} Correct or remove it.")
    return NumberedRow(where, row)


def _stream_csv(file: IO[bytes], origin: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(LONGEST_ROW)  # 131,072 if not set: less than some documents
    records = _csv_records(_lines_of(file))
    header = _csv_header(next(records, None), origin)
    for number, (line, record) in enumerate(records, 1):
        where = Place(origin, number, line)
        if isinstance(record, csv.Error):
            error = f"{where} is not CSV ({record}). Correct or remove it."
            yield NumberedRow(where, {}, error)
        elif len(record) != len(header):
            error = (
                f"{where} has not as many columns as the header: {len(record)} instead of "
                f"{len(header)} ({listed(header)}). Put quotes around a text that has commas."
            )
            yield NumberedRow(where, {}, error)
        else:
            yield NumberedRow(where, dict(zip(header, record, strict=True)))


def _csv_records(lines: Iterator[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Each record with the line it starts at; blank lines are left out."""
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                # An open quote swallows all that follows; nobody knows how many rows that were.
                raise ValueError(f"the quote opened in line {line} is never closed") from error
            yield line, error
        else:
            if record:
                yield line, record


def _csv_header(first: tuple[int, list[str] | csv.Error] | None, origin: str) -> list[str]:
    if first is None:
        return []
    line, names = first
    if isinstance(names, csv.Error):
        raise DataError(f"Line {line} of {origin} is not a CSV header ({names}). Correct it.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"The header of {origin} names the column {twice[0]!r:.80} twice. Rename one."
        )
    return names


def _stream_parquet(file: IO[bytes], origin: str) -> Iterator[NumberedRow]:
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=ROWS_AT_A_TIME)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield NumberedRow(Place(origin, number), row)
    except Exception as error:  # pyarrow has kinds of its own beside Python's
        raise ValueError(str(error)) from error


def _lines_of(file: IO[bytes]) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for number, line in enumerate(iter(partial(text.readline, LONGEST_ROW), ""), 1):
        if len(line) >= LONGEST_ROW:
            raise ValueError(f"line {number} has more than {LONGEST_ROW:,} characters")
        yield line


_FORMATS: dict[str, Callable[[IO[bytes], str], Iterator[NumberedRow]]] = {
    ".jsonl": _stream_jsonl,
    ".csv": _stream_csv,
    ".parquet": _stream_parquet,
}


def _missing_file(path: Path) -> str:
    if path.exists():
        return f"{path} is no file of rows but a folder or a device. Name a file."
    if not path.parent.is_dir():
        return f"File {path} does not exist, nor does its folder. Paths start at {Path.cwd()}."
    names = [entry.name for entry in path.parent.iterdir()]
    return f"File {path} does not exist.{nearest(path.name, names)} Paths start at {Path.cwd()}."
