"""Rows of a frozen embedding table.  Axes: V vocabulary, D model width; `...` any leading axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softprompt_dist.parallel import ranks


class FrozenEmbedding(nn.Module):
    """Looks tokens up where the table lies, and brings only their rows to the device.

    Under ZeRO-3 the table stays in the memory-mapped checkpoint: gathering it (263 MB for T5-XXL)
    to read a few hundred rows would cost more than any layer.
    """

    def __init__(
        self, table_VD: Tensor, device: torch.device, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        super().__init__()
        # Rounded as the model does it, but a number of the host's: no device is asked for it.
        self._scale = float(torch.tensor(scale).to(dtype))
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

        Ids best lie on the host, which then waits for nothing. The rows are the same however the
        table is stored and wherever it lies: they are rounded to that type.
        """
        rows = self._table_VD[ranks.sent(ids, self._table_VD.device)]
        rows = ranks.sent(rows, self._device).to(self._dtype)
        return rows if self._scale == 1 else rows * self._scale
