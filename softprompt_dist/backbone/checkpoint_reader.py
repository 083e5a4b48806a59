"""The tensors of a Hugging Face checkpoint folder, read by ranges of rows and never whole.

Axes: R rows, C columns (all but the first axis, flattened).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from softprompt_dist.backbone.flat_weights import row_ranges
from softprompt_dist.backbone.formats import Int8Rows
from softprompt_dist.backbone.weight_files import checkpoint_files, open_weight_file
from softprompt_dist.errors import BackboneError

SCALE_SUFFIX = "_scale"
"""Behind the name of an int8 tensor: its rows' scales, fp32 (as `softprompt convert` writes)."""
_MAPPED_BYTES = 64 * 2**20
"""Mapped pages count as this process's memory; closing the files gives them back."""
_FAULT_BYTES = 2 * 2**20
"""The system may map this much around a byte that is read: samples of a tensor are not small."""
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckpointReader:
    """Rows of a folder's tensors, from memory-mapped files.

    int8 tensors with a `_scale` beside them come back as the floating-point rows they stand for.

    Raises:
        BackboneError: a file is missing, truncated, or not of its kind; or what is read holds NaN.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = [open_weight_file(path) for path in checkpoint_files(folder)]
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

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values."""
        num_rows, *rest = self.shapes[one] or (1,)
        return self.shapes[one] == self.shapes[other] and all(
            torch.equal(
                self.rows(one, rows.start, rows.stop).double(),
                self.rows(other, rows.start, rows.stop).double(),
            )
            for rows in row_ranges(0, num_rows, torch.float32.itemsize * math.prod(rest))
        )

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
        if rows.is_floating_point() and rows.numel():
            self._refuse_broken(name, first, rows)
        self._bytes_read += max(rows.numel() * rows.element_size(), _FAULT_BYTES)
        return rows

    def _refuse_broken(self, name: str, first: int, rows_RC: Tensor) -> None:
        if all(map(math.isfinite, rows_RC.aminmax())):  # which NaN makes NaN
            return
        finite_R = rows_RC.isfinite().all(dim=1)
        row = int((~finite_R).nonzero()[0])
        what = "NaN" if rows_RC[row].isnan().any() else "an infinite value"
        raise BackboneError(
            f"{self.folder} holds {what}, which is no weight, in row {first + row} of {name}. The "
            "checkpoint itself is broken: fetch it again, or use another."
        )


def _is_scale(name: str) -> bool:
    return name.endswith(".weight" + SCALE_SUFFIX)
