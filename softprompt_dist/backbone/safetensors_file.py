"""Safetensors files that are written bit by bit: no tensor need ever be whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor

from softprompt_dist.durable import FileDigest

if TYPE_CHECKING:
    from typing_extensions import Self

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
_ALIGNMENT = 8
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """A tensor as a file stores it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        return prod(self.shape) * self.dtype.itemsize


class _NewFile:
    """A file that is whole and on the disk when its `with` block has ended without an error."""

    _file: BinaryIO
    bytes_missing: int
    """Of the tensors' data."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flush and close."""
        with self._file as file:
            if kind is None:
                assert self.bytes_missing == 0, f"{self.bytes_missing} bytes were not written"
                _flush(file)


class SafetensorsWriter(_NewFile):
    """A new file for known tensors, whose rows come in any order.

    Leaving the `with` block flushes it to the disk. Format:
    https://github.com/huggingface/safetensors#format.

    Raises:
        OSError: the file is there already, or the disk is full.
    """

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
        # The widest numbers first: each tensor then starts at a multiple of its numbers' width.
        ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        header, ends = _header(ordered, metadata)
        self._starts = {e.name: len(header) + ends[e.name] - e.num_bytes for e in ordered}
        self.bytes_missing = sum(entry.num_bytes for entry in ordered)
        self._file = path.open("xb")
        self._file.write(header)

    def write_rows(self, name: str, first: int, bytes_RN: Tensor) -> None:
        """Put rows [R, N] (uint8) of a tensor in their place, from row `first` on."""
        self._file.seek(self._starts[name] + first * bytes_RN.shape[1])
        self._file.write(bytes_RN.contiguous().view(-1).numpy().data)
        self.bytes_missing -= bytes_RN.numel()


class SafetensorsStream(_NewFile):
    """A new file for known tensors of one type, written from its first byte to its last.

    So its digest is known when it is written. Leaving the `with` block flushes it to the disk.

    Raises:
        OSError: the file is there already, or the disk is full.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        assert len({entry.dtype for entry in entries}) <= 1, "tensors would start unaligned"
        header, _ = _header(list(entries), metadata)
        self.bytes_missing = sum(entry.num_bytes for entry in entries)
        self._num_bytes = len(header) + self.bytes_missing
        self._sha256 = hashlib.sha256(header)
        self._file = path.open("xb", buffering=0)
        _write_all(self._file, memoryview(header))

    def write(self, values_N: Tensor) -> None:
        """The next elements of the tensors, which follow each other in the order of `entries`."""
        content = values_N.contiguous().view(torch.uint8).numpy().data
        self._sha256.update(content)
        _write_all(self._file, content)
        self.bytes_missing -= len(content)

    @property
    def digest(self) -> FileDigest:
        """Of the whole file, once it is written."""
        assert self.bytes_missing == 0, f"{self.bytes_missing} bytes were not written"
        return FileDigest(self._num_bytes, self._sha256.hexdigest())


class _HasBytes(Protocol):
    @property
    def num_bytes(self) -> int: ...


T = TypeVar("T", bound=_HasBytes)


def in_shards(weights: Iterable[T], max_bytes: int | None) -> dict[str, list[T]]:
    """File name -> its weights in their order, up to `max_bytes`; a greater one is alone in one."""
    shards: list[list[T]] = [[]]
    num_bytes = 0
    for weight in weights:
        if shards[-1] and max_bytes is not None and num_bytes + weight.num_bytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(weight)
        num_bytes += weight.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def index_of_shards(shards: Mapping[str, Sequence[Entry]]) -> bytes:
    """Hugging Face's `model.safetensors.index.json`: which file holds which tensor."""
    total = sum(entry.num_bytes for entries in shards.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(document, indent=2) + "\n").encode()


def _write_all(file: BinaryIO, content: memoryview) -> None:
    """An unbuffered file may take less than it is given: nothing is left for `close` to fail at."""
    while content:
        content = content[file.write(content) :]


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        # Whoever reads it next reads what the disk has.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _header(ordered: list[Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What stands before the data, and where each tensor's data ends, counted from there."""
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    ends: dict[str, int] = {}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.num_bytes
        ends[entry.name] = end
        described[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, ends
