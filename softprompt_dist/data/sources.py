"""Rows of text from files, from the hub, or from the demo's package."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from softprompt_dist.data.vader import VADER_TASKS, vader_rows
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Rows of one split and where they come from, for messages; row numbers count from 1."""

    origin: str
    rows: list[Row]


def read_splits(config: SourceConfig) -> dict[str, Rows]:
    """The splits the source gives: always `train`, perhaps `validation` and `test`.

    Raises:
        DataError: something is missing, misnamed or unreadable.
    """
    return _READERS[config.kind](config)


def read_file(path: Path) -> Rows:
    """All rows of a .jsonl, .csv (with a header row) or .parquet file, the first two also .gz.

    Raises:
        DataError: the file is missing, of another kind, not UTF-8, or malformed (line named).
    """
    if not path.is_file():
        raise DataError(_missing_file(path))
    reader = _FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
    if reader is None:
        raise DataError(f"{path} must end in {', '.join(_FORMATS)} (the first two also .gz).")
    try:
        return Rows(path.name, reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8: {error}. Convert it, e.g. with iconv.") from error
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}. Check that the file is whole.") from error


def nearest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean ...?` with the valid name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _read_files(config: SourceConfig) -> dict[str, Rows]:
    _require(config.train, "train", "a path such as data/train.jsonl")
    names = {split: getattr(config, split) for split in SPLITS}
    return {split: read_file(Path(name)) for split, name in names.items() if name}


def _read_vader(config: SourceConfig) -> dict[str, Rows]:
    for split in SPLITS:
        if getattr(config, split):
            raise DataError(
                f"task.source.{split} is {getattr(config, split)!r}, but the vader source has "
                f"splits of its own (by hash of the text). Remove it."
            )
    if config.name not in VADER_TASKS:
        raise DataError(
            f"task.source.name is {config.name!r}; the vader source has "
            f"{' and '.join(VADER_TASKS)}."
        )
    return {"train": Rows(f"vader {config.name}", vader_rows(config.name))}


def _read_hub(config: SourceConfig) -> dict[str, Rows]:
    import datasets

    name = _require(config.name, "name", "a data set's name such as google/boolq")
    wanted = {s: getattr(config, s) for s in SPLITS if getattr(config, s)} or {"train": "train"}
    _require(wanted.get("train"), "train", "a split's name such as train")
    showing_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config.subset, revision=config.revision)
    except Exception as error:  # the hub's client raises kinds of its own and of its libraries
        raise DataError(
            f"Cannot load data set {name!r} (subset {config.subset!r}, revision "
            f"{config.revision!r}): {error} Check the names, and that the hub can be reached."
        ) from error
    finally:
        if showing_progress:
            datasets.enable_progress_bars()
    for split in wanted.values():
        if split not in found:
            raise DataError(
                f"Data set {name} has no split {split!r}.{nearest(split, found)} "
                f"Its splits: {', '.join(found)}."
            )
    return {split: Rows(f"{name} {hub}", found[hub].to_list()) for split, hub in wanted.items()}


_READERS: dict[str, Callable[[SourceConfig], dict[str, Rows]]] = {
    "files": _read_files,
    "hub": _read_hub,
    "vader": _read_vader,
}


def _read_jsonl(path: Path) -> list[Row]:
    with _open_text(path) as file:
        return [_json_row(n, line) for n, line in enumerate(file, 1) if line.strip()]


def _json_row(number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not a JSON object of fields but {line.strip()[:40]!r}")
    return row


def _read_csv(path: Path) -> list[Row]:
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        return [_csv_row(reader.line_num, row) for row in reader]


def _csv_row(line: int, row: dict[str | Any, Any]) -> Row:
    if None in row or None in row.values():
        raise ValueError(f"line {line} has not as many columns as the header")
    return row


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows


_FORMATS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _require(value: str | None, key: str, example: str) -> str:
    if not value:
        raise DataError(f"task.source.{key} is not given; it must be {example}.")
    return value


def _missing_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"File {path} does not exist, nor does its folder. Paths start at {Path.cwd()}."
    names = [entry.name for entry in path.parent.iterdir()]
    return f"File {path} does not exist.{nearest(path.name, names)} Paths start at {Path.cwd()}."
