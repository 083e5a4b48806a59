"""Rows of a frozen embedding table.  Axes: V vocabulary, D model width; `...` any leading axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrozenEmbedding(nn.Module):
    """Looks tokens up where the table lies, and brings only their rows to the device.

    Under ZeRO-3 the table stays in the memory-mapped checkpoint: gathering it (263 MB for T5-XXL)
    to read a few hundred rows would cost more than any layer.
    """

    def __init__(
        self, table_VD: Tensor, device: torch.device, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        super().__init__()
        self._scale = scale
        self._table_VD = table_VD
        self._device = device
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of what `forward` gives."""
        return self._dtype

    @property
    def table_VD(self) -> Tensor:  # noqa: N802
        """The table, in its stored type, where it lies."""
        return self._table_VD

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the tokens `ids` [...]: [..., D] on the device, in the backbone's type.

        The same however the table is stored and wherever it lies: rows are rounded to that type.
        """
        rows = self._table_VD[ids.to(self._table_VD.device)].to(self._device).to(self._dtype)
        return rows if self._scale == 1 else rows * torch.tensor(self._scale).to(rows)
