"""A block's weights as one run of bytes: the unit that is cut, gathered, off-loaded and freed.

Axes: R output rows, N bytes of a row.

One parameter for each block, not ten or twenty, is what makes ZeRO-3 cheap here: one collective
brings a block in, its result is used in place, and DeepSpeed's bookkeeping is paid once per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softprompt_dist.backbone.formats import PlainRows, RowFormat

ALIGNMENT = 64
"""Bytes; weights and parts start at multiples, so that they can be seen as numbers of any type."""
_PIECE_BYTES = 4 * 2**20
"""Rows are read, converted and copied in pieces of about this size, which a cache holds."""


@dataclass
class Slot:
    """Where one weight lies in its block's bytes."""

    name: str
    format: RowFormat
    num_rows: int
    num_columns: int
    start: int
    """First byte."""
    flat: nn.Parameter | None = None
    """The block's bytes; here too, since DeepSpeed makes access through a module slow."""
    weight_RC: Tensor | None = None
    """The weight as numbers, where it lies whole and plain for good."""

    @property
    def row_bytes(self) -> int:
        """N, bytes of a row."""
        return self.format.row_bytes(self.num_columns)

    @property
    def end(self) -> int:
        """One behind the last byte."""
        return self.start + self.num_rows * self.row_bytes

    @property
    def bytes_RN(self) -> Tensor:  # noqa: N802
        """The weight's bytes as they are now; under ZeRO-3 only while the block is gathered."""
        assert self.flat is not None, f"{self.name} has not been loaded"
        num_bytes = self.num_rows * self.row_bytes
        return self.flat.narrow(0, self.start, num_bytes).view(self.num_rows, -1)

    def pieces(self, first_byte: int, last_byte: int) -> Iterator[range]:
        """The rows that a range of the block's bytes touches, a few at a time."""
        # What a conversion works with is fp32, whatever is stored and kept.
        fp32_row_bytes = self.num_columns * torch.float32.itemsize
        return row_ranges(*self.rows_between(first_byte, last_byte), fp32_row_bytes)

    def place(self, rows: range, first_byte: int, last_byte: int) -> tuple[int, int]:
        """The bytes of the block that both the rows and the range hold."""
        start = self.start + rows.start * self.row_bytes
        end = self.start + rows.stop * self.row_bytes
        return max(first_byte, start), min(last_byte, end)

    def rows_between(self, first_byte: int, last_byte: int) -> tuple[int, int]:
        """Rows that a range of the block's bytes touches; an empty range where it touches none."""
        first = max(first_byte, self.start) - self.start
        last = min(last_byte, self.end) - self.start
        if first >= last:
            return 0, 0
        return first // self.row_bytes, -(-last // self.row_bytes)


def row_ranges(first: int, last: int, row_bytes: int) -> Iterator[range]:
    """The rows from `first` to `last` (exclusive), a few at a time."""
    step = max(1, _PIECE_BYTES // row_bytes)
    for start in range(first, last, step):
        yield range(start, min(last, start + step))


class FrozenBlock(nn.Module):
    """A part of the model that is brought in, used and let go as a whole.

    The computation is hidden from `modules()`: DeepSpeed then sees one module with one parameter,
    and puts its hooks there and nowhere inside. With `checkpoint_activations` only the input is
    kept for the backward pass and the rest computed again; that happens inside the hooks, so one
    gather serves both.
    """

    def __init__(self, computation: nn.Module) -> None:
        super().__init__()
        self.__dict__["computation"] = computation
        self.flat: nn.Parameter | None = None
        self.slots: list[Slot] = []
        self.checkpoint_activations = False

    computation: nn.Module

    def __getattr__(self, name: str) -> Any:
        """What Hugging Face's model asks of its layers, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["computation"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The computation's."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(
                self.computation,
                *args,
                use_reentrant=False,
                preserve_rng_state=self.training,
                **kwargs,
            )
        return self.computation(*args, **kwargs)

    def train(self, mode: bool = True) -> FrozenBlock:
        """Also of the computation, which `nn.Module` does not see."""
        self.computation.train(mode)
        super().train(mode)
        return self

    def add_slot(self, name: str, row_format: RowFormat, num_rows: int, num_columns: int) -> Slot:
        """Reserve room for a weight behind the others."""
        start = -(-self.num_bytes // ALIGNMENT) * ALIGNMENT
        slot = Slot(name, row_format, num_rows, num_columns, start)
        self.slots.append(slot)
        return slot

    def hold(self, flat: nn.Parameter) -> None:
        """Take `flat` [num_bytes] uint8, sharded or not, as the bytes of all slots."""
        self.flat = flat
        stays = not hasattr(flat, "ds_id")
        for slot in self.slots:
            slot.flat = flat
            if stays and isinstance(slot.format, PlainRows):
                slot.weight_RC = slot.bytes_RN.detach().view(slot.format.dtype)

    @property
    def num_bytes(self) -> int:
        """Of all slots together."""
        return self.slots[-1].end if self.slots else 0


@contextmanager
def held_part(tensor: Any) -> Iterator[Tensor]:
    """What this rank holds of a tensor: all of it, or its part, brought in from the disk."""
    if not hasattr(tensor, "ds_tensor"):
        yield tensor.detach()
        return
    if tensor.ds_tensor.status.name == "INFLIGHT":
        tensor.nvme_swapper.synchronize_reads()
    on_disk = tensor.ds_tensor.status.name == "NOT_AVAILABLE"
    if on_disk:  # DeepSpeed has put a constant in its place
        tensor.nvme_swapper.swap_in([tensor], async_op=False)
    try:
        yield tensor.ds_tensor.detach()
    finally:
        if on_disk:
            tensor.nvme_swapper.remove_partition_and_release_buffers([tensor])
