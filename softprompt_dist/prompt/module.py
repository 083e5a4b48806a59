"""The soft prompt itself. Axes: B batch, P prompt, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """P trainable vectors of the backbone's width, shared by all examples.

    Args:
        initial_PD: copied, and kept in fp32: with values in the hundreds, as tuned prompts have,
            most updates would be lost to bf16 rounding.
    """

    def __init__(self, initial_PD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_PD.detach().to(torch.float32, copy=True).contiguous())

    def forward(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        """The prompt for each row of a batch, prompt_BPD, cast to the activations' `dtype`."""
        # Cast after the expansion: the gradient's sum over the rows is then taken in fp32.
        return self.weight.expand(batch_size, -1, -1).to(dtype)
