"""What a forward pass leaves with autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor


def drop_as_cuda_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout keeps booleans, as CUDA's kernels; attention no more than without it."""
    attention = F.scaled_dot_product_attention

    def fused(*tensors: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
        return attention(*tensors, **options)

    monkeypatch.setattr(F, "dropout", lambda x, p: torch.native_dropout(x, p, train=True)[0])
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)


def bytes_kept(
    forward: Callable[[], Tensor],
    weights: Iterable[Tensor],
    counts: Callable[[Tensor], bool] = lambda tensor: True,
) -> int:
    """Bytes of all storages that are kept for the backward pass and count, weights apart."""
    of_weights = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if counts(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert forward().requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in of_weights)
