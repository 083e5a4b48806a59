"""A safetensors file that is written by rows: no tensor of it need ever be whole in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

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


class SafetensorsWriter:
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
        self._bytes_missing = sum(entry.num_bytes for entry in ordered)
        self._file = path.open("xb")
        self._file.write(header)

    def write_rows(self, name: str, first: int, bytes_RN: Tensor) -> None:
        """Put rows [R, N] (uint8) of a tensor in their place, from row `first` on."""
        self._file.seek(self._starts[name] + first * bytes_RN.shape[1])
        self._file.write(bytes_RN.contiguous().view(-1).numpy().data)
        self._bytes_missing -= bytes_RN.numel()

    def __enter__(self) -> SafetensorsWriter:
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
                assert self._bytes_missing == 0, f"{self._bytes_missing} bytes were not written"
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
