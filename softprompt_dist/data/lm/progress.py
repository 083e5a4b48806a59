"""What is known of a build that may be interrupted: building.jsonl, gone when it is finished.

One JSON object a line: what is being built, then each shard that is on the disk and where in the
sources it ended. Lines are only added; a torn last line is no line.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from softprompt_dist.data.lm.manifest import ShardRecord
from softprompt_dist.durable import cut_file, extend_file, replace_file
from softprompt_dist.errors import DataError
from softprompt_dist.untrusted import parse_json

PROGRESS = "building.jsonl"


@dataclass(frozen=True)
class Cursor:
    """All rows before it are in whole shards."""

    source: int = 0
    row: int = 1
    """Of that source, from 1."""


@dataclass(frozen=True)
class Progress:
    """Whole shards, and where to go on."""

    shards: tuple[ShardRecord, ...] = ()
    cursor: Cursor = Cursor()


class ProgressFile:
    """The file of that name in the folder of a build."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS

    def start_or_resume(self, plan: Mapping[str, Any]) -> Progress:
        """Take down what is being built, or find what was built of just that.

        Raises:
            DataError: something else is being built there.
            OSError: it cannot be written.
        """
        lines = self._whole_lines()
        if not lines:
            replace_file(self._path, _line(plan))
            return Progress()
        documents = [self._parsed(line) for line in lines]
        if difference := _first_difference(json.loads(_line(plan)), documents[0]):
            raise DataError(
                f"{self._path.parent} holds an interrupted build of something else: {difference}. "
                f"Start the same command as then, choose another folder, or delete this one."
            )
        cut_file(self._path, sum(map(len, lines)))
        shards = documents[1:]
        if not shards:
            return Progress()
        try:
            return Progress(
                tuple(ShardRecord.model_validate(values["shard"]) for values in shards),
                Cursor(**shards[-1]["cursor"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            values = parse_json(line)
        except ValueError as error:
            raise self._damaged(error) from error
        if not isinstance(values, dict):
            raise self._damaged(TypeError("a line is no object"))
        return values

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self._path} is damaged ({error!s:.300}). Delete {self._path.parent} and build anew."
        )

    def add(self, shard: ShardRecord, cursor: Cursor) -> None:
        """Take down a shard that is on the disk, and where the next one begins.

        Raises:
            OSError: the disk is full.
        """
        values = {"shard": shard.model_dump(), "cursor": vars(cursor)}
        extend_file(self._path, _line(values))

    def delete(self) -> None:
        """All is done, or nothing was."""
        self._path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True)
        return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def hold(folder: Path) -> IO[bytes]:
    """Hold a build's folder alone until the returned file is closed or the process ends.

    Raises:
        DataError: another process builds there.
    """
    lock = (folder / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DataError(
            f"Another process is building in {folder}. Wait for it, or choose another folder."
        ) from error
    except OSError:  # a file system without locks
        pass
    return lock


def _first_difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    for key in {**now, **then}:
        if now.get(key) == then.get(key):
            continue
        if key == "sources":
            return _source_difference(now["sources"], then.get("sources", []))
        return f"{key} was {_shown(then.get(key))}, and is {_shown(now.get(key))} now"
    return None


def _source_difference(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> str:
    for one, other in zip(now, then, strict=False):
        if one != other:
            return f"the source {_described(other)} is {_described(one)} now"
    return f"there were {len(then)} sources, and are {len(now)} now"


def _described(source: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in source.items() if key != "name")
    return f"{source.get('name')} ({facts})"


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(values), ensure_ascii=False).encode() + b"\n"
