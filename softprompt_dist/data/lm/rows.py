"""Rows of fixed length, as a model reads them. Axes: B rows, S encoder, T decoder positions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowBatch:
    """A micro-batch. Several examples may share a row; segments tell them apart."""

    decoder_input_ids_BT: Tensor
    """int64. Encoder-decoders: each example's targets one to the right, behind the start piece;
    decoder-only: the tokens themselves."""
    labels_BT: Tensor
    """int64: what each decoder position must predict; -100 where nothing."""
    target_segments_BT: Tensor
    """int64: 0 where padding, k for the k-th example of the row."""
    is_packed: bool
    """Whether any row holds more than one example."""
    has_padding: bool
    """Whether any position of either side is padding."""
    num_real_tokens: int
    """Positions of both sides that are not padding."""
    input_ids_BS: Tensor | None = None
    """int64; None for decoder-only backbones."""
    input_segments_BS: Tensor | None = None
    """As target_segments_BT."""

    @property
    def num_positions(self) -> int:
        """Of both sides, padding included."""
        inputs = 0 if self.input_ids_BS is None else self.input_ids_BS.numel()
        return inputs + self.decoder_input_ids_BT.numel()

    def to(self, device: torch.device) -> RowBatch:
        """The same on `device`."""
        tensors: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)
