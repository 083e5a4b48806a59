"""Where the rows of each split are: files, the hub, the official SuperGLUE zips, or PyPI."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from softprompt_dist.data.catalogue.definition import CatalogueTask
from softprompt_dist.data.hub import find_data_set, without_progress_bars
from softprompt_dist.data.rows import (
    ROWS_AT_A_TIME,
    NumberedRow,
    Place,
    Row,
    nearest,
    opener,
    sha256_of,
    stream_member,
    stream_rows,
)
from softprompt_dist.data.superglue_files import superglue_files
from softprompt_dist.data.vader import VADER_TASKS, vader_rows, vader_sha256
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitSource:
    """The rows of one split, which are read when they are asked for."""

    origin: str
    """For messages and records."""
    stream: Callable[[], Iterator[NumberedRow]]
    sha256: Callable[[], str | None] = lambda: None
    """Of the file, in hex."""
    expected_sha256: str | None = None
    """What it must be, if not anything."""
    revision: str | None = None
    """The commit that was read, where the hub has one."""
    fingerprint: str | None = None
    """The hub client's, of what it loaded."""


@dataclass(frozen=True)
class HubNames:
    """What the hub is asked for."""

    data_set: str
    subset: str | None
    revision: str | None
    splits: Mapping[str, str]
    """Ours -> the hub's."""


def open_splits(config: SourceConfig, task: CatalogueTask | None) -> dict[str, SplitSource]:
    """The splits that the source has, unread; `task` fills in what `config` leaves open.

    Raises:
        DataError: something is missing or misnamed.
    """
    if config.sha256 and config.kind in ("hub", "vader"):
        instead = "task.source.revision fixes" if config.kind == "hub" else "the package fixes"
        raise DataError(
            f"task.source.sha256 is given, but kind is {config.kind}, which has no files of its "
            f"own; {instead} what is read. Remove it."
        )
    sources = _OPENERS[config.kind](config, task)
    if needless := [split for split in config.sha256 if split not in sources]:
        raise DataError(
            f"task.source.sha256.{needless[0]} is given, but the source has no file for "
            f"{needless[0]}. Name it in task.source.{needless[0]}, or remove the checksum."
        )
    for split, sha256 in config.sha256.items():
        sources[split] = replace(sources[split], expected_sha256=sha256)
    return sources


def _open_files(config: SourceConfig, task: CatalogueTask | None) -> dict[str, SplitSource]:
    paths = {split: Path(name) for split in SPLITS if (name := getattr(config, split))}
    return {
        split: SplitSource(
            path.name,
            partial(stream_rows, path),
            partial(sha256_of, opener(path), str(path)),
        )
        for split, path in paths.items()
    }


def _open_superglue(config: SourceConfig, task: CatalogueTask | None) -> dict[str, SplitSource]:
    if task is None or task.folder is None:
        raise DataError(
            f"task.source.kind is superglue, but {task.name if task else 'a task of your own'} is "
            f"no task of SuperGLUE. Set task.catalogue to one, such as boolq, or name the files "
            f"with kind files."
        )
    path = Path(_require(config.path, "path", "combined.zip, a task's zip, or their folder"))
    named = {split: getattr(config, split) for split in SPLITS}
    return {
        split: SplitSource(
            origin, partial(stream_member, opens, origin), partial(sha256_of, opens, origin)
        )
        for split, (origin, opens) in superglue_files(path, task.folder, named).items()
    }


def _open_vader(config: SourceConfig, task: CatalogueTask | None) -> dict[str, SplitSource]:
    for split in SPLITS:
        if getattr(config, split):
            raise DataError(
                f"task.source.{split} is {getattr(config, split)!r}, but the vader source has "
                f"splits of its own (by hash of the text). Remove it."
            )
    name = config.name
    if name not in VADER_TASKS:
        *others, last = VADER_TASKS
        raise DataError(
            f"task.source.name is {name!r}; the vader source has {', '.join(others)} and {last}."
        )
    origin = f"vader {name}"
    return {"train": SplitSource(origin, lambda: _numbered(origin, vader_rows(name)), vader_sha256)}


def _open_hub(config: SourceConfig, task: CatalogueTask | None) -> dict[str, SplitSource]:
    names = hub_names(config, task)
    found, commit = _load_from_hub(names.data_set, names.subset, names.revision)
    return {
        split: SplitSource(
            f"{names.data_set} {hub_split}",
            partial(_hub_rows, names.data_set, hub_split, found),
            revision=commit,
            fingerprint=getattr(found.get(hub_split), "_fingerprint", None),
        )
        for split, hub_split in names.splits.items()
        # What the recipe names must be there; what only the catalogue knows need not.
        if hub_split in found or getattr(config, split)
    }


def hub_names(config: SourceConfig, task: CatalogueTask | None) -> HubNames:
    """What to ask the hub for, as the catalogue says where the recipe does not.

    The catalogue's subset and revision are those of its data set and do not go with another name. A
    split that the recipe names for one use is not the catalogue's for a second one.

    Raises:
        DataError: no data set is named.
    """
    given = {split: name for split in SPLITS if (name := getattr(config, split))}
    if task is None:
        name = _require(config.name, "name", "a data set's name such as google/boolq")
        return HubNames(name, config.subset, config.revision, given or {"train": "train"})
    hub = task.hub
    known = {split: name for split in SPLITS if (name := getattr(hub, split))}
    wanted = {split: name for split, name in known.items() if name not in given.values()} | given
    if config.name in (None, hub.name):
        subset, revision = config.subset or hub.subset, config.revision or hub.revision
        return HubNames(hub.name, subset, revision, wanted)
    return HubNames(config.name, config.subset, config.revision, wanted)


def _load_from_hub(name: str, subset: str | None, revision: str | None) -> tuple[Any, str | None]:
    """The splits by their names, and the commit that they are of."""
    try:
        found = find_data_set(name, subset, revision)
        with without_progress_bars():
            found.builder.download_and_prepare()
            return found.builder.as_dataset(), found.commit
    except DataError:
        raise
    except Exception as error:  # the hub's client raises kinds of its own and of its libraries
        raise DataError(
            f"Cannot load data set {name!r} (subset {subset!r}, revision {revision!r}): {error} "
            f"Check the names, and that the hub can be reached; or name rows of your own "
            f"(task.source, --data)."
        ) from error


def _hub_rows(name: str, split: str, found: Any) -> Iterator[NumberedRow]:
    if split not in found:
        raise DataError(
            f"Data set {name} has no split {split!r}.{nearest(split, found)} "
            f"Its splits: {', '.join(found)}."
        )
    tables = found[split].with_format("arrow").iter(batch_size=ROWS_AT_A_TIME)
    return _numbered(f"{name} {split}", (row for table in tables for row in table.to_pylist()))


def _numbered(origin: str, rows: Iterable[Row]) -> Iterator[NumberedRow]:
    return (NumberedRow(Place(origin, number), row) for number, row in enumerate(rows, 1))


def _require(value: str | None, key: str, example: str) -> str:
    if not value:
        raise DataError(f"task.source.{key} is not given; it must be {example}.")
    return value


_OPENERS: dict[str, Callable[[SourceConfig, CatalogueTask | None], dict[str, SplitSource]]] = {
    "files": _open_files,
    "hub": _open_hub,
    "vader": _open_vader,
    "superglue": _open_superglue,
}
