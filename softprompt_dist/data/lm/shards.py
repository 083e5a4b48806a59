"""A shard: token ids of whole documents end to end in one raw file, their offsets in another.

`shard-00000.tokens` holds unsigned integers, `shard-00000.offsets` int64, one more than there are
documents, from 0 to the number of tokens; all little-endian, nothing else, ready to be mapped.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softprompt_dist.data.downloads import file_sha256
from softprompt_dist.data.lm.manifest import ShardRecord
from softprompt_dist.data.lm.token_source import IdArray, TokenSource
from softprompt_dist.durable import flush_folder
from softprompt_dist.errors import DataError

OFFSET_DTYPE = "<i8"


def shard_name(index: int) -> str:
    """Of the files, without their endings."""
    return f"shard-{index:05d}"


class _HashedFile:
    """A file that gets its name when it is whole and on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".tmp-shard-{uuid.uuid4().hex}")
        self._digest = hashlib.sha256()
        self._file = self._temporary.open("xb")

    def write(self, values: npt.NDArray[Any]) -> None:
        content = np.ascontiguousarray(values).data.cast("B")
        self._file.write(content)
        self._digest.update(content)

    def publish(self) -> str:
        """Hex sha256 of what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Delete it, unless it was published."""
        # Closing writes what is buffered, for which a full disk has no room.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard; until `publish` nothing of it can be seen."""

    def __init__(self, folder: Path, index: int, token_dtype: str) -> None:
        self.name = shard_name(index)
        self.num_tokens = 0
        self.num_documents = 0
        self._folder = folder
        self._token_dtype = token_dtype
        self._tokens = _HashedFile(folder / f"{self.name}.tokens")
        self._offsets = _HashedFile(folder / f"{self.name}.offsets")

    def add(self, token_ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Add documents: their ids end to end and how many each has.

        Raises:
            OSError: the disk is full.
        """
        self._tokens.write(token_ids.astype(self._token_dtype, copy=False))
        starts = self.num_tokens + np.cumsum(lengths) - lengths
        self._offsets.write(starts.astype(OFFSET_DTYPE))
        self.num_tokens += len(token_ids)
        self.num_documents += len(lengths)

    def publish(self, *, num_bytes: int, num_empty: int, num_bad: int) -> ShardRecord:
        """Give the files their names; what the manifest says of them.

        Raises:
            OSError: the disk is full.
        """
        self._offsets.write(np.array([self.num_tokens], dtype=OFFSET_DTYPE))
        record = ShardRecord(
            name=self.name,
            documents=self.num_documents,
            tokens=self.num_tokens,
            text_bytes=num_bytes,
            empty_documents=num_empty,
            bad_rows=num_bad,
            tokens_sha256=self._tokens.publish(),
            offsets_sha256=self._offsets.publish(),
        )
        flush_folder(self._folder)
        return record

    def discard(self) -> None:
        """Delete what was not published."""
        self._tokens.discard()
        self._offsets.discard()


class Shard:
    """The documents of one shard, mapped when they are first read."""

    def __init__(self, folder: Path, record: ShardRecord, token_dtype: str) -> None:
        self._folder, self._record, self._token_dtype = folder, record, np.dtype(token_dtype)
        offset_bytes = np.dtype(OFFSET_DTYPE).itemsize
        self._sizes = {
            "tokens": record.tokens * self._token_dtype.itemsize,
            "offsets": (record.documents + 1) * offset_bytes,
        }

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return self._record.tokens

    @property
    def num_documents(self) -> int:
        """At least one."""
        return self._record.documents

    @property
    def fingerprint(self) -> str:
        """Of both files."""
        return self._record.tokens_sha256 + self._record.offsets_sha256

    def tokens(self, first: int, last: int) -> IdArray:
        """token_ids[first:last], a copy."""
        return self._token_ids[first:last].astype(np.int64)

    def offsets(self, first: int, last: int) -> IdArray:
        """Where documents `first` to `last` (exclusive) begin, and where the last of them ends."""
        return self._document_offsets[first : last + 1].astype(np.int64)

    def check_sizes(self) -> None:
        """Compare the sizes of both files with the manifest.

        Raises:
            DataError: one is missing, shorter or longer.
        """
        for kind, expected in self._sizes.items():
            path = self._path(kind)
            if not path.is_file():
                raise DataError(f"{path} is missing. Copy the corpus again, or build it anew.")
            if (found := path.stat().st_size) != expected:
                raise DataError(
                    f"{path} has {found:,} bytes, and the manifest says {expected:,}: it was cut "
                    f"off or changed. Copy the corpus again, or build it anew."
                )

    def check_content(self) -> None:
        """Compare the sha256 of both files with the manifest.

        Raises:
            DataError: one is not what was built.
        """
        self.check_sizes()
        for kind in self._sizes:
            found = file_sha256(self._path(kind))
            expected = getattr(self._record, f"{kind}_sha256")
            if found != expected:
                raise DataError(
                    f"{self._path(kind)} has sha256 {found[:12]}..., and the manifest says "
                    f"{expected[:12]}...: it was changed. Copy the corpus again, or build it anew."
                )

    @cached_property
    def _token_ids(self) -> npt.NDArray[Any]:
        return self._mapped("tokens", self._token_dtype)

    @cached_property
    def _document_offsets(self) -> npt.NDArray[Any]:
        return self._mapped("offsets", np.dtype(OFFSET_DTYPE))

    def _mapped(self, kind: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        import pyarrow as pa

        # Arrow's maps live on when their file is closed; numpy's keep a descriptor each, of which
        # a process may have fewer than a corpus has shards.
        with pa.memory_map(str(self._path(kind))) as file:
            return np.frombuffer(file.read_buffer(), dtype=dtype)

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._record.name}.{kind}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: another process makes its own."""
        kept = ("_folder", "_record", "_token_dtype", "_sizes")
        return {name: self.__dict__[name] for name in kept}


class ConcatenatedTokens:
    """Several sources one after another, without a copy; one may stand there several times."""

    def __init__(self, parts: Sequence[TokenSource], fingerprint: str) -> None:
        self._parts = tuple(parts)
        self.fingerprint = fingerprint
        self._token_starts = _starts([part.num_tokens for part in parts])
        self._document_starts = _starts([part.num_documents for part in parts])

    @property
    def num_tokens(self) -> int:
        """Of all parts."""
        return int(self._token_starts[-1])

    @property
    def num_documents(self) -> int:
        """Of all parts."""
        return int(self._document_starts[-1])

    def tokens(self, first: int, last: int) -> IdArray:
        """token_ids[first:last], a copy."""
        pieces = [
            self._parts[part].tokens(start, end)
            for part, start, end in _overlaps(self._token_starts, first, last)
        ]
        return pieces[0] if len(pieces) == 1 else _concatenated(pieces)

    def offsets(self, first: int, last: int) -> IdArray:
        """Where documents `first` to `last` (exclusive) begin, and where the last of them ends."""
        pieces = [
            self._parts[part].offsets(start, end) + self._token_starts[part]
            for part, start, end in _overlaps(self._document_starts, first, last)
        ]
        if not pieces:  # first == last: where that document begins
            part = int(np.searchsorted(self._document_starts[1:-1], first, side="right"))
            local = first - int(self._document_starts[part])
            return self._parts[part].offsets(local, local) + self._token_starts[part]
        # Each piece ends where the next one begins.
        return _concatenated([*(piece[:-1] for piece in pieces[:-1]), pieces[-1]])


def _starts(lengths: Sequence[int]) -> IdArray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _overlaps(starts: IdArray, first: int, last: int) -> list[tuple[int, int, int]]:
    """The parts between `first` and `last`, each with the stretch of it."""
    last = min(last, int(starts[-1]))
    found = []
    part = int(np.searchsorted(starts, first, side="right")) - 1
    while first < last:
        end = min(last, int(starts[part + 1]))
        found.append((part, first - int(starts[part]), end - int(starts[part])))
        part, first = part + 1, end
    return found


def _concatenated(pieces: Sequence[IdArray]) -> IdArray:
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])
