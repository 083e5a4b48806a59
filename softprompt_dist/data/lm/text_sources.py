"""Where the text of a corpus is: files of lines, JSON lines or parquet, data sets of the hub.

Lines are read here and not by `datasets`, whose readers cannot say which line is wrong.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, cast

from softprompt_dist.data.downloads import file_sha256
from softprompt_dist.data.lm.documents import RawRows, RowFormat
from softprompt_dist.errors import DataError
from softprompt_dist.untrusted import open_regular

BATCH_BYTES = 1 << 20
"""Of text that one worker gets at a time; has no influence on what is built."""
LONGEST_LINE = 1 << 28

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_NO_TEXT = {
    **dict.fromkeys((".csv", ".tsv"), "Write it as .jsonl or .parquet first"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".bz2", ".7z"), "Unpack it first"),
    **dict.fromkeys((".arrow", ".bin", ".npy"), "Write it as .parquet or .jsonl first"),
}
_ROWS_AT_A_TIME = 1000
_BOM = b"\xef\xbb\xbf"


class TextSource(Protocol):
    """Rows, always in the same order."""

    @property
    def name(self) -> str:
        """For messages and the manifest; no path of this machine."""

    @property
    def unit(self) -> str:
        """What a row is called: Line or Row."""

    @property
    def num_bytes(self) -> int | None:
        """Of the file; None if unknown."""

    def identity(self) -> dict[str, Any]:
        """By what a build that goes on knows the source again; quick to find."""

    def record(self) -> dict[str, str]:
        """What the manifest says of its content: `sha256` or `revision`."""

    def rows(self, number: int, first_row: int) -> Iterator[RawRows]:
        """The rows from `first_row` on, about `BATCH_BYTES` at a time; `number` is the source's.

        Raises:
            DataError: the source cannot be read.
        """


@dataclass(frozen=True)
class FileSource:
    """A file, which may be packed if it has lines."""

    path: Path
    format: RowFormat
    """line, json; value: parquet."""
    field_name: str

    @property
    def name(self) -> str:
        """The file's, without its folder."""
        return self.path.name

    @property
    def unit(self) -> str:
        """Parquet has no lines."""
        return "Row" if self.format == "value" else "Line"

    @property
    def num_bytes(self) -> int | None:
        """Its size."""
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """Name, size and time of the last change."""
        status = self.path.stat()
        return {"name": self.name, "size": status.st_size, "changed": status.st_mtime_ns}

    def record(self) -> dict[str, str]:
        """The sha256 of the file as it lies there."""
        return {"sha256": file_sha256(self.path)}

    def rows(self, number: int, first_row: int) -> Iterator[RawRows]:
        """See `TextSource`."""
        read = self._parquet_rows if self.format == "value" else self._lines
        with _readable(str(self.path)):
            open_regular(self.path).close()
            yield from read(number, first_row)

    def _lines(self, number: int, first_row: int) -> Iterator[RawRows]:
        with open_regular(self.path) as file:
            unpack = _PACKED.get(self.path.suffix)
            unpacked = cast("IO[bytes]", unpack(file)) if unpack else file
            lines = islice(_lines_of(unpacked, self.name), first_row - 1, None)
            for values in _batches(lines):
                yield RawRows(
                    number,
                    first_row,
                    values,
                    self.format,
                    self.field_name,
                    position=file.tell(),
                )
                first_row += len(values)

    def _parquet_rows(self, number: int, first_row: int) -> Iterator[RawRows]:
        import datasets

        found = datasets.load_dataset(
            "parquet", data_files=[str(self.path)], split="train", streaming=True
        )
        yield from column_rows(found, number, first_row, self.field_name)


def column_rows(found: Any, number: int, first_row: int, field_name: str) -> Iterator[RawRows]:
    """A column of a streamed data set."""
    seen = 0
    for table in found.with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
        skipped = max(0, min(first_row - 1 - seen, table.num_rows))
        row, seen = seen + skipped + 1, seen + table.num_rows
        table = table.slice(skipped)
        is_there = field_name in table.column_names
        column = table.column(field_name if is_there else 0).to_pylist()
        instead = None if is_there else tuple(table.column_names)
        for values in _batches(column):
            yield RawRows(number, row, values, "value", field_name, instead)
            row += len(values)


def file_source(path: Path, field_name: str = "text") -> FileSource:
    """The source that a file is, by the end of its name: .parquet, JSON lines, else text.

    Raises:
        DataError: there is no such file, or it is of a kind that is not read.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"Text file {path} {what}. Name files of text, one document a line (.gz and .xz too), "
            f"of JSON lines or of parquet; a recipe may also name folders of `softprompt corpus "
            f"build`."
        )
    suffix = Path(path.name.removesuffix(path.suffix) if path.suffix in _PACKED else path).suffix
    if remedy := _NO_TEXT.get(suffix.lower()):
        raise DataError(
            f"{path} ends in {suffix}; text (.txt, or any other ending), .jsonl and .parquet are "
            f"read, the first two also .gz and .xz. {remedy}."
        )
    if suffix == ".parquet":
        return FileSource(path, "value", field_name)
    return FileSource(path, "json" if suffix in _JSON_SUFFIXES else "line", field_name)


def part_of(sources: Sequence[TextSource], part: int, num_parts: int) -> list[TextSource]:
    """Every `num_parts`-th source, from number `part` (from 1).

    Raises:
        DataError: there are fewer sources than parts.
    """
    if len(sources) < num_parts:
        raise DataError(
            f"--part {part}/{num_parts} needs at least {num_parts} source files, and there "
            f"{'is' if len(sources) == 1 else 'are'} {len(sources)}. Build fewer parts."
        )
    return list(sources[part - 1 :: num_parts])


@contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        said = str(error).rstrip(".")
        raise DataError(f"Cannot read {shown}: {said}. Check that the file is whole.") from error


def _lines_of(file: IO[bytes], name: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), 1):
        if len(line) == LONGEST_LINE:
            raise DataError(
                f"Line {number} of {name} is longer than {LONGEST_LINE >> 20} MiB. A text file has "
                f"one document a line: is it one, and not one long document or binary?"
            )
        yield line.removeprefix(_BOM) if number == 1 else line


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for value in values:
        batch.append(value)
        size += len(value) if isinstance(value, (str, bytes)) else 1
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
