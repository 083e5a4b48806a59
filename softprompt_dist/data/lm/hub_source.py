"""Data sets of the hub as sources of text: each file of theirs is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softprompt_dist.data.hub import find_data_set, without_progress_bars
from softprompt_dist.data.lm.documents import RawRows
from softprompt_dist.data.lm.text_sources import column_rows
from softprompt_dist.errors import DataError

PREFIX = "hub:"


@dataclass(frozen=True)
class HubFile:
    """One of the files that a split of a data set consists of."""

    data_set: Any
    """The streamed split."""
    split_name: str
    """Data set, configuration and split."""
    index: int
    num_files: int
    revision: str | None
    """The commit that is read, where the hub has one."""
    field_name: str

    @property
    def name(self) -> str:
        """Such as `allenai/c4 en train 3/1024`."""
        return f"{self.split_name} {self.index + 1}/{self.num_files}"

    @property
    def unit(self) -> str:
        """Its lines, if it has any, are not known here."""
        return "Row"

    @property
    def num_bytes(self) -> int | None:
        """Not known."""
        return None

    def identity(self) -> dict[str, Any]:
        """Name and revision."""
        return {"name": self.name, "revision": self.revision}

    def record(self) -> dict[str, str]:
        """The revision, where there is one: a data set in a folder of this machine has none."""
        return {"revision": self.revision} if self.revision else {}

    def rows(self, number: int, first_row: int) -> Iterator[RawRows]:
        """See `TextSource`."""
        try:
            yield from column_rows(self._stream, number, first_row, self.field_name)
        except DataError:
            raise
        except Exception as error:  # the hub's client raises kinds of its own and of its libraries
            raise DataError(
                f"Reading {self.name} failed: {error}. What was built stays: start the same "
                f"command again to go on."
            ) from error

    @cached_property
    def _stream(self) -> Any:
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self.data_set, rank=self.index, world_size=self.num_files)


def hub_files(spec: str, *, split: str, revision: str | None, field_name: str) -> list[HubFile]:
    """The files of a split of `hub:NAME` or `hub:NAME:CONFIG`, unread.

    Raises:
        DataError: no such data set, configuration or split, or the hub cannot be reached.
    """
    name, _, config = spec.removeprefix(PREFIX).partition(":")
    if not name:
        raise DataError(f"{spec!r} names no data set. Write hub:NAME or hub:NAME:CONFIG.")
    data_set, commit = _streamed(name, config or None, split, revision)
    shown = " ".join(filter(None, (Path(name).name if Path(name).exists() else name, config)))
    num_files = data_set.n_shards
    return [
        HubFile(data_set, f"{shown} {split}", index, num_files, commit, field_name)
        for index in range(num_files)
    ]


def _streamed(
    name: str, config: str | None, split: str, revision: str | None
) -> tuple[Any, str | None]:
    """A split, and the commit that it is of."""
    try:
        found = find_data_set(name, config, revision)
        with without_progress_bars():
            return found.builder.as_streaming_dataset(split=split), found.commit
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(_unknown(" ".join(filter(None, (name, config, split))), error)) from error


def _unknown(name: str, error: Exception) -> str:
    said = str(error).strip().splitlines()
    return (
        f"Cannot load data set {name}: {said[0] if said else type(error).__name__} Check the names "
        f"(hub:NAME:CONFIG, --split, --revision) and that the hub can be reached; or name files."
    )
