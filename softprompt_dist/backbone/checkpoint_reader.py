"""The tensors of a Hugging Face checkpoint folder, read by ranges of rows and never whole.

Axes: R rows, C columns (all but the first axis, flattened).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompt_dist.backbone.formats import Int8Rows
from softprompt_dist.errors import BackboneError
from softprompt_dist.names import is_name
from softprompt_dist.untrusted import parse_json, read_bounded

log = logging.getLogger(__name__)

T = TypeVar("T")

SCALE_SUFFIX = "_scale"
"""Behind the name of an int8 tensor: its rows' scales, fp32 (as `softprompt convert` writes)."""
_MAPPED_BYTES = 64 * 2**20
"""Mapped pages count as this process's memory; closing the files gives them back."""
_FAULT_BYTES = 2 * 2**20
"""The system may map this much around a byte that is read: samples of a tensor are not small."""
_MAX_INDEX_BYTES = 1 << 28
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UNREADABLE = (SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError)


def checkpoint_files(folder: Path) -> list[Path]:
    """Weight files of a folder: safetensors (one or sharded), else PyTorch `.bin`.

    Raises:
        BackboneError: none there, or a shard that the index names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise BackboneError(
                    f"Backbone {folder} lacks {missing}, which {index.name} names. Fetch the "
                    "missing files again."
                )
            return [folder / name for name in names]
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise BackboneError(
        f"Backbone {folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of "
        "shards). Point backbone.path at a Hugging Face checkpoint folder."
    )


class CheckpointReader:
    """Rows of a folder's tensors, from memory-mapped files.

    int8 tensors with a `_scale` beside them come back as the floating-point rows they stand for.

    Raises:
        BackboneError: a file is missing, truncated, or not of its kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = [_open(path) for path in checkpoint_files(folder)]
        self._bytes_read = 0
        self._file_of = {name: file for file in self._files for name in file.shapes}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor but the scales."""
        return {
            name: file.shapes[name] for name, file in self._file_of.items() if not _is_scale(name)
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What the first file's header says besides the tensors."""
        return self._files[0].metadata

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._file_of[name].rows(name, 0, 1).dtype

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """values_RC: rows `first` to `last` (exclusive), in the stored floating-point type."""
        stored = self._stored(name, first, last)
        if not self.is_quantized(name):
            return stored
        return stored.float() * self._stored(name + SCALE_SUFFIX, first, last)

    def encoded_int8(self, name: str, first: int, last: int) -> Tensor:
        """The rows as `Int8Rows` bytes, without a detour where they are stored as int8."""
        if not self.is_quantized(name):
            return Int8Rows().encode(self._stored(name, first, last))
        scale_R1 = self._stored(name + SCALE_SUFFIX, first, last)
        return Int8Rows.join(self._stored(name, first, last), scale_R1[:, 0])

    def holds_numbers(self, name: str) -> bool:
        """Whether `rows` gives a tensor's values: it is floating-point, or int8 as ours.

        Quantized checkpoints of other projects hold codes under the same names.
        """
        if not self.is_quantized(name):
            return self.dtype(name) in _FLOATING
        scale = name + SCALE_SUFFIX
        one_each = math.prod(self._file_of[scale].shapes[scale]) == self.shapes[name][0]
        return self.dtype(name) == torch.int8 and one_each

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored as int8 rows with scales."""
        return name + SCALE_SUFFIX in self._file_of

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in its shape."""
        shape = self.shapes[name]
        num_rows = shape[0] if shape else 1
        return self.rows(name, 0, num_rows).reshape(shape)

    def mapped_table(self, name: str) -> Tensor:
        """The whole tensor [R, C] as a view of the mapped file: read where it is looked at."""
        return self._file_of[name].mapped(name)

    def close(self) -> None:
        """Give the mapped pages back; the next read maps again."""
        self._bytes_read = 0
        for file in self._files:
            file.close()

    def _stored(self, name: str, first: int, last: int) -> Tensor:
        if self._bytes_read > _MAPPED_BYTES:
            self.close()
        rows = self._file_of[name].rows(name, first, last)
        self._bytes_read += max(rows.numel() * rows.element_size(), _FAULT_BYTES)
        return rows


class _File(ABC):
    """One weight file."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: dict[str, str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: Any = None

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


class _SafetensorsFile(_File):
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


class _PickledFile(_File):
    """A `.bin`, read with `weights_only`: code in it is never run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = {}
        tensors = self._guarded(self._load)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def _load(self) -> dict[str, Tensor]:
        if self._mapped is None:
            stored = self._unpickled()
            if not isinstance(stored, dict):
                raise ValueError("it holds no dictionary of tensors.")
            self._mapped = {n: t for n, t in stored.items() if isinstance(t, Tensor)}
        tensors: dict[str, Tensor] = self._mapped
        return tensors

    def _unpickled(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
        log.warning(
            "%s is of torch's old format, which cannot be mapped: all of it is read into memory. "
            "`softprompt convert` makes a copy that can.",
            self.path,
        )
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def _slice(self, name: str, first: int, last: int) -> Tensor:
        tensor = self._load()[name]
        return tensor[first:last] if tensor.dim() else tensor.reshape(1)

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


def _open(path: Path) -> _File:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)


def _is_scale(name: str) -> bool:
    return name.endswith(".weight" + SCALE_SUFFIX)


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
