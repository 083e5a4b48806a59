"""The output file: whole windows on the disk, whatever happens, and continued where it ends."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from softprompt_dist.durable import cut_file, extend_file, flush_folder
from softprompt_dist.errors import DataError, MachineError
from softprompt_dist.identity import Identity
from softprompt_dist.run.prediction_journal import Commit, PredictionJournal, Totals
from softprompt_dist.run.prediction_rows import InputRow, RowStream, rows_digest

log = logging.getLogger(__name__)

_HASHED_BYTES = 1 << 20
_FRESH = "Start over with --fresh, or name another --output."


class PredictionOutput:
    """An output file and its journal, held by one process from `open` to `close`."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Change nothing yet.

        Args:
            path: the file.
            fresh: take nothing of what is there.
        """
        self.path = path
        self.totals = Totals()
        self._fresh = fresh
        self._journal = PredictionJournal(path)
        self._held: IO[bytes] | None = None
        self._kept_bytes = 0
        self._kept_entries = 0
        """Bytes of the journal that hold."""

    def open(self) -> None:
        """Make the file if there is none, and keep others from writing to it.

        Raises:
            MachineError: it cannot be written, or another process is writing to it.
            DataError: it holds something that no run of ours has written.
        """
        if self.path.is_dir():
            raise DataError(f"--output {self.path} is a folder; name a file in it.")
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._held = _held_alone(self.path)
        is_known = self._fresh or self._journal.made_for() is not None
        if not is_known and self.path.stat().st_size:
            raise DataError(
                f"{self.path} is there already, without a {self._journal.path.name} that says what "
                f"it belongs to. {_FRESH}"
            )

    def close(self) -> None:
        """Let go of the file; it is removed if nothing was ever written to it."""
        if self._held is None:
            return
        if not os.fstat(self._held.fileno()).st_size and not self._journal.path.exists():
            self.path.unlink(missing_ok=True)
        self._held.close()
        self._held = None

    def check_made_for(self, made_for: Mapping[str, Any]) -> None:
        """Refuse to continue what was made for something else.

        Args:
            made_for: all that decides the content, or as much of it as is known.

        Raises:
            DataError: with what differs.
        """
        before = None if self._fresh else self._journal.made_for()
        if before is None:
            return
        changed = [
            f"  {name}: {before.get(name)!r:.90} then, {value!r:.90} now"
            for name, value in made_for.items()
            if before.get(name) != value
        ]
        self._refuse(changed)

    def _check_backbone(self, here: Identity) -> None:
        before = None if self._fresh else self._journal.made_for()
        if before is not None:
            self._refuse([f"  {line}" for line in _backbone_of(before).differences(here)])

    def _refuse(self, changed: Sequence[str]) -> None:
        if changed:
            lines = "\n".join(changed)
            raise DataError(f"{self.path} was made with other settings:\n{lines}\n{_FRESH}")

    def completion(self, input_file: os.stat_result) -> Mapping[str, Any] | None:
        """What is known of the output if all of this very input file is in it.

        Told by sizes and the time of change: nothing is read. None if that does not show it.
        """
        last = [] if self._fresh else self._journal.last()
        commit, record = last[0].commit if last else None, last[-1].values if last else {}
        done: Mapping[str, Any] | None = record.get("complete")
        if commit is None or done is None:
            return None
        is_same = _identity(input_file) == done["input"]
        return done if is_same and self.path.stat().st_size == commit.num_bytes else None

    def resume(self, rows: RowStream, block_rows: int) -> None:
        """Find the last whole window of the output, and take the rows up to it.

        Args:
            rows: at the first.
            block_rows: how many are batched together.

        Raises:
            DataError: the output or those rows have changed since.
        """
        if self._fresh:
            return
        size, is_complete = self.path.stat().st_size, False
        with self.path.open("rb") as written:
            for entry in self._journal.entries():
                is_complete = is_complete or "complete" in entry.values
                commit = entry.commit
                if commit is None:
                    self._kept_entries = self._kept_entries or entry.end
                elif size < commit.num_bytes:
                    return
                else:
                    again = self._answered_before(commit, written, rows)
                    if commit.totals.rows % block_rows and not rows.at_end():
                        # The input has grown: its last rows have others in their block now.
                        rows.give_back(again)
                        return
                    self.totals = commit.totals
                    self._kept_bytes, self._kept_entries = commit.num_bytes, entry.end
        if is_complete and size > self._kept_bytes:
            raise DataError(f"{self.path} is longer than what was written to it. {_FRESH}")

    def _answered_before(
        self, commit: Commit, written: IO[bytes], rows: RowStream
    ) -> list[InputRow]:
        """The rows of the next window, which are those whose answers are written."""
        if _digest(written, commit.num_bytes - self._kept_bytes) != commit.sha256:
            raise DataError(f"{self.path} has been changed since it was written. {_FRESH}")
        again = rows.take(commit.totals.rows - self.totals.rows)
        if rows_digest(again) != commit.input_sha256:
            raise DataError(_other_rows(self.path, again, self.totals.rows, commit.totals.rows))
        return again

    def begin(self, made_for: Mapping[str, Any], backbone: Identity | None = None) -> None:
        """Cut off what is not kept; from here on nothing else is changed but by adding.

        Args:
            made_for: see `check_made_for`.
            backbone: what answers; None where nothing is left to answer.

        Raises:
            DataError: see `check_made_for`; or another backbone has answered so far.
            MachineError: the files cannot be written.
        """
        self.check_made_for(made_for)
        if backbone is not None:
            self._check_backbone(backbone)
            made_for = {**made_for, "identity": asdict(backbone)}
        with self._writing():
            if self._kept_entries:
                self._journal.cut(self._kept_entries)
            cut_file(self.path, self._kept_bytes)
            if not self._kept_entries:
                self._kept_entries = self._journal.start(made_for)
            flush_folder(self.path.parent)

    def append(self, lines: bytes, input_sha256: str, totals: Totals) -> None:
        """Add a window: first to the file, and once it is on the disk to the journal.

        Raises:
            MachineError: the files cannot be written.
        """
        with self._writing():
            extend_file(self.path, lines)
            self._kept_bytes += len(lines)
            digest = hashlib.sha256(lines).hexdigest()
            self._journal.add_commit(Commit(self._kept_bytes, digest, input_sha256, totals))
        self.totals = totals

    def finish(self, input_file: os.stat_result, environment: Mapping[str, Any]) -> None:
        """Note that all rows are done.

        Raises:
            MachineError: the journal cannot be written.
        """
        record = {"input": _identity(input_file), **asdict(self.totals), "environment": environment}
        with self._writing():
            self._journal.add_completion(record)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = self.totals.rows
            rest = f" Then start the same command again: {kept} rows are kept." if kept else ""
            raise MachineError(
                f"Cannot write {self.path}: {error.strerror or error}. Free some space, give this "
                f"user permission, or name another --output.{rest}"
            ) from error


def _backbone_of(made_for: Mapping[str, Any]) -> Identity:
    """What has answered so far; release 0.1.0 noted two digests of it.

    Raises:
        DataError: the journal was changed by hand.
    """
    try:
        if "identity" in made_for:
            return Identity.from_json(made_for["identity"])
        tokenizer = {"vocabulary": made_for["tokenizer"]} if "tokenizer" in made_for else {}
        values = {"path": "", "weights": made_for.get("backbone", ""), "tokenizer": tokenizer}
        return Identity.from_json(values)
    except ValueError as error:
        raise DataError(f"The journal is damaged: {error}. {_FRESH}") from error


def _held_alone(path: Path) -> IO[bytes]:
    """The file, made if absent, locked; the system frees it with the process."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise MachineError(
            f"Another process is writing to {path}. Wait for it, or name another --output."
        ) from error
    except OSError:
        log.debug("%s: no locks on this file system", path)
    return file


def _identity(input_file: os.stat_result) -> dict[str, int]:
    return {"bytes": input_file.st_size, "changed_ns": input_file.st_mtime_ns}


def _digest(file: IO[bytes], count: int) -> str:
    digest = hashlib.sha256()
    while count > 0 and (block := file.read(min(count, _HASHED_BYTES))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


def _other_rows(output: Path, again: list[InputRow], first: int, last: int) -> str:
    origin = again[0].where.origin if again else "the input"
    return (
        f"Rows {first + 1} to {last} of {origin} are not those that were answered in {output}: the "
        f"input has changed since, or is another file. {_FRESH}"
    )
