"""How the rows of a frozen weight lie in memory, and how one multiplies by them there.

Axes: R output rows, C input columns, N bytes of a row; `...` any leading axes.

A weight is kept as bytes, so that whatever its precision it can be one part of a block's single
run of bytes, be cut at any byte, gathered and off-loaded as bytes, and be looked at as numbers only
while it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

_SCALE_BYTES = 4
_LARGEST_INT8 = 127


class RowFormat(Protocol):
    """Rows of floating-point numbers as rows of bytes."""

    def row_bytes(self, num_columns: int) -> int:
        """N, bytes that a row of `num_columns` takes."""

    def encode(self, values_RC: Tensor) -> Tensor:
        """bytes_RN (uint8) of floating-point rows; each row depends on itself alone."""

    def multiply(self, input_C: Tensor, bytes_RN: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """[..., C] times the weight transposed, plus the bias [R]: [..., R]."""

    def multiply_transposed(self, grad_R: Tensor, bytes_RN: Tensor) -> Tensor:
        """[..., R] times the weight: [..., C], the gradient at `multiply`'s input."""


@dataclass(frozen=True)
class PlainRows:
    """Rows as they are, in fp32 or bf16."""

    dtype: torch.dtype

    def row_bytes(self, num_columns: int) -> int:
        """See `RowFormat`."""
        return num_columns * self.dtype.itemsize

    def encode(self, values_RC: Tensor) -> Tensor:
        """See `RowFormat`."""
        return values_RC.to(self.dtype).contiguous().view(torch.uint8)

    def multiply(self, input_C: Tensor, bytes_RN: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """See `RowFormat`."""
        return F.linear(input_C, bytes_RN.view(self.dtype), bias_R)

    def multiply_transposed(self, grad_R: Tensor, bytes_RN: Tensor) -> Tensor:
        """See `RowFormat`."""
        return grad_R @ bytes_RN.view(self.dtype)


@dataclass(frozen=True)
class Int8Rows:
    """Each row as C int8 numbers and, behind them, the fp32 scale that they are multiplied by.

    Symmetric: a row's greatest magnitude becomes 127. The scale stands in its row, so that it is
    read, cut and gathered with it. Inputs are not quantized.
    """

    def row_bytes(self, num_columns: int) -> int:
        """See `RowFormat`."""
        return num_columns + _SCALE_BYTES

    def encode(self, values_RC: Tensor) -> Tensor:
        """See `RowFormat`."""
        lowest_R, greatest_R = torch.aminmax(values_RC.detach(), dim=1)
        scale_R = torch.maximum(lowest_R.abs(), greatest_R.abs()).float() / _LARGEST_INT8
        # A row of zeros is stored as zeros, whatever its scale.
        divisor_R = torch.where(scale_R > 0, scale_R, torch.ones_like(scale_R))
        quantized_RC = (values_RC / divisor_R[:, None]).round_().to(torch.int8)
        return self.join(quantized_RC, scale_R)

    @staticmethod
    def join(quantized_RC: Tensor, scale_R: Tensor) -> Tensor:
        """bytes_RN of int8 rows and their fp32 scales."""
        scale_bytes = scale_R.float().contiguous()[:, None].view(torch.uint8)
        return torch.cat([quantized_RC.view(torch.uint8), scale_bytes], dim=1)

    @staticmethod
    def split(bytes_RN: Tensor) -> tuple[Tensor, Tensor]:
        """int8 rows (a view) and their fp32 scales, from `bytes_RN`."""
        quantized_RC = bytes_RN[:, :-_SCALE_BYTES].view(torch.int8)
        # A copy even of a single row, whose scale may lie at an address unfit for numbers.
        scale_bytes = bytes_RN[:, -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        scale_R = scale_bytes.view(torch.float32)[:, 0]
        return quantized_RC, scale_R

    def multiply(self, input_C: Tensor, bytes_RN: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """See `RowFormat`."""
        quantized_RC, scale_R = self.split(bytes_RN)
        scale_R = scale_R.to(input_C.dtype)
        # The integers are exact in bf16; the scale multiplies R results instead of R x C weights.
        product_R = F.linear(input_C, quantized_RC.to(input_C.dtype))
        return product_R * scale_R if bias_R is None else torch.addcmul(bias_R, product_R, scale_R)

    def multiply_transposed(self, grad_R: Tensor, bytes_RN: Tensor) -> Tensor:
        """See `RowFormat`."""
        quantized_RC, scale_R = self.split(bytes_RN)
        return (grad_R * scale_R.to(grad_R.dtype)) @ quantized_RC.to(grad_R.dtype)
