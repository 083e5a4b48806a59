"""The weight files of a Hugging Face checkpoint folder, and the tensors in one of them.

Axes: R rows, C columns (all but the first axis, flattened).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompt_dist.errors import BackboneError
from softprompt_dist.names import is_name
from softprompt_dist.untrusted import open_regular, parse_json, read_bounded

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_INDEX_BYTES = 1 << 28
_UNREADABLE = (SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError)
_LENGTH_BYTES = 8


def checkpoint_files(folder: Path) -> list[Path]:
    """Weight files of a folder, in transformers' order of precedence.

    `model.safetensors`, else the shards of its index, else the same of `pytorch_model.bin`. Shards
    that lie beside the one file are left out, with a warning.

    Raises:
        BackboneError: none there, or a shard that the index names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole = folder / f"{stem}.{suffix}"
        if whole.is_file():
            _warn_of_shards(whole, tuple(sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))))
            return [whole]
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _shards(index)
    raise BackboneError(
        f"Backbone {folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of "
        "shards). Point backbone.path at a Hugging Face checkpoint folder."
    )


@cache  # several readers open a folder; once is enough
def _warn_of_shards(whole: Path, shards: tuple[Path, ...]) -> None:
    if shards:
        log.warning(
            "%s holds two sets of weights: %s, which is read, as transformers does, and %d shards "
            "such as %s, which are not. Remove the set that is out of date.",
            whole.parent,
            whole.name,
            len(shards),
            shards[0].name,
        )


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BackboneError(
            f"Backbone {index.parent} lacks {missing}, which {index.name} names. Fetch the "
            "missing files again."
        )
    return [index.parent / name for name in names]


class WeightFile(ABC):
    """One weight file."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: dict[str, str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: Any = None
        self._guarded(lambda: open_regular(path).close())

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """A view [R, C] of rows of a tensor."""
        return self._guarded(lambda: self._slice(name, first, last).reshape(last - first, -1))

    def mapped(self, name: str) -> Tensor:
        """A view of a whole tensor that stays valid when this file is closed."""
        self.close()
        table = self._guarded(lambda: self._slice(name, 0, self.shapes[name][0]))
        self.close()
        return table

    def close(self) -> None:
        """Unmap; the next read maps again."""
        self._mapped = None

    @abstractmethod
    def _slice(self, name: str, first: int, last: int) -> Tensor:
        """A view of rows of a tensor in the mapped file."""

    def _guarded(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except _UNREADABLE as error:
            reason = (str(error) or "it is empty or cut short").splitlines()[0]
            raise BackboneError(
                f"Cannot read {self.path}: {reason} The file is damaged or incomplete; fetch it "
                "again."
            ) from error


class _SafetensorsFile(WeightFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shapes, self.metadata = self._guarded(self._header)

    def _header(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        with safe_open(self.path, framework="pt") as file:
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}

    def _slice(self, name: str, first: int, last: int) -> Tensor:
        if self._mapped is None:
            self._mapped = safe_open(self.path, framework="pt")
        if not self.shapes[name]:
            return self._mapped.get_tensor(name).reshape(1)
        return self._mapped.get_slice(name)[first:last]


class _PickledFile(WeightFile):
    """A `.bin`, read with `weights_only`: code in it is never run.

    It is unpickled once, for its layout alone; numbers are read from the mapped file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = {}
        self._places = self._guarded(self._layout)
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def _layout(self) -> dict[str, _Place]:
        with self.path.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
            if is_zip:
                _check_readable_in_place(file)
            file.seek(0)
            numbers = _SkippedNumbers(file)
            source: Any = file if is_zip else numbers
            # Of a zip, torch notes itself where a tensor without numbers has them.
            stored = torch.load(
                source,
                map_location="meta" if is_zip else "cpu",
                weights_only=True,
            )
        if not isinstance(stored, dict):
            raise ValueError("it holds no dictionary of tensors.")
        return {
            name: _Place(
                numbers.offset_of(storage) + int(tensor.storage_offset()) * tensor.itemsize,
                tensor.dtype,
                tuple(tensor.shape),
                tensor.stride(),
            )
            for name, tensor in stored.items()
            if isinstance(tensor, Tensor)
            for storage in [tensor.untyped_storage()]
        }

    def _slice(self, name: str, first: int, last: int) -> Tensor:
        if self._mapped is None:
            size = self.path.stat().st_size
            self._mapped = torch.UntypedStorage.from_file(str(self.path), False, size)
        return self._places[name].rows(self._mapped, first, last)

    def mapped(self, name: str) -> Tensor:
        """As of any file, but a copy in memory where it begins at an odd byte of an old format."""
        place = self._places[name]
        if place.start % place.dtype.itemsize:
            log.warning(
                "%s begins at an odd byte of %s, so a rank that would map it (%.2f GB) holds it in "
                "memory. `softprompt convert` makes a copy in which it can be mapped.",
                name,
                self.path,
                math.prod(place.shape) * place.dtype.itemsize / 1e9,
            )
        return super().mapped(name)

    def _guarded(self, read: Callable[[], T]) -> T:
        try:
            return super()._guarded(read)
        except BackboneError:
            raise
        except Exception as error:  # damaged opcodes end in errors of any kind
            # Its own words advise to run whatever the file holds.
            raise BackboneError(
                f"Cannot read {self.path}: it is damaged or holds more than tensors (code in it is "
                "never run). Fetch it again, or use a safetensors checkpoint."
            ) from error


def _check_readable_in_place(file: BinaryIO) -> None:
    """That numbers lie in the file as they are: torch would unpack them, or swap their bytes."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                why = "is compressed inside"
            elif entry.filename.endswith("/byteorder") and (
                archive.read(entry) != sys.byteorder.encode()
            ):
                why = "was written on a machine of another byte order"
            else:
                continue
            raise BackboneError(
                f"{file.name} {why}. Load and save it once with torch, as safetensors."
            )


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    start: int
    """Byte of its first element."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def rows(self, file: torch.UntypedStorage, first: int, last: int) -> Tensor:
        """A view of rows in the mapped file; a copy, if they begin at an odd byte."""
        shape: tuple[int, ...] = (1,)
        if not self.shape:
            stride, start = shape, self.start
        else:
            shape, stride = (last - first, *self.shape[1:]), self.stride
            start = self.start + first * stride[0] * self.dtype.itemsize
        rows = torch.empty(0, dtype=self.dtype)
        if 0 in shape:
            return rows.reshape(shape)
        num_elements = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        end = start + num_elements * self.dtype.itemsize
        if end > file.nbytes():
            raise EOFError
        part = file[start:end]
        if start % self.dtype.itemsize:
            part = part.clone()
        return rows.set_(part, 0, shape, stride)


class _SkippedNumbers:
    """A file of torch's old format that notes where each storage begins, and reads none.

    Of that format torch says nowhere what lies where. It asks the file to read into each storage,
    memory that is reserved by then and not yet used.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._offsets: dict[int, int] = {}
        """Address -> where in the file that memory's content begins."""
        self.read, self.readline = file.read, file.readline
        self.seek, self.tell = file.seek, file.tell

    def readinto(self, into: memoryview) -> int:
        """Note, and skip what is longer than the length that stands before each storage."""
        offset = self.tell()
        self._offsets[torch.frombuffer(into, dtype=torch.uint8).data_ptr()] = offset
        if len(into) <= _LENGTH_BYTES:
            return self._file.readinto(into)
        return self.seek(min(offset + len(into), self._size)) - offset

    def offset_of(self, storage: torch.UntypedStorage) -> int:
        """Where in the file a storage begins."""
        if storage.nbytes() == 0:
            return 0
        if storage.device.type == "meta":
            return int(storage._checkpoint_offset or 0)  # noqa: SLF001 - torch documents it
        return self._offsets[storage.data_ptr()]


def open_weight_file(path: Path) -> WeightFile:
    """A file of a checkpoint, by its suffix.

    Raises:
        BackboneError: it is truncated, or not of its kind.
    """
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = dict(parse_json(read_bounded(index, _MAX_INDEX_BYTES))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"Cannot read {index}: {error!s:.300}. Fetch the file again."
        ) from error
    # Files of the hub's cache are links out of their folder, so only their names are looked at.
    if elsewhere := [name for name in names.values() if not is_name(name)]:
        raise BackboneError(
            f"{index} names the file {elsewhere[0]!r:.100}, and may name files beside it only. "
            "Fetch the file again."
        )
    return names
