"""The loss of T5X (`losses.py`). Axes: B batch, T target tokens, V vocabulary, N = B T, R of N.

Logits are the largest tensor of a step. Of its size there is only its gradient besides: softmax is
made some rows at a time, and again for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt_dist.data.batching import IGNORED_LABEL

_CPU_ELEMENTS = 1 << 18
"""Logits that are worked on at a time: in fp32 they stay in a core's cache."""
_DEVICE_ELEMENTS = 1 << 26
"""On a device: few kernels, and temporary memory stays small beside the logits."""


class TokenLoss(NamedTuple):
    """Sums over the tokens that count, each a scalar tensor."""

    total: Tensor
    """Cross-entropy plus z-loss in nats, fp32, differentiable."""
    cross_entropy: Tensor
    """The same without z-loss."""
    num_tokens: Tensor
    """How many tokens count, int64."""


def token_loss(
    logits_BTV: Tensor, labels_BT: Tensor, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> TokenLoss:
    """Cross-entropy of the target tokens, summed and not averaged.

    Args:
        logits_BTV: in any floating dtype; the loss is computed in fp32.
        labels_BT: token ids; positions with -100 do not count.
        z_loss: weight of log(Z)^2, which keeps the softmax normaliser Z near 1.
        label_smoothing: probability spread over the other V - 1 tokens. The entropy of the smoothed
            target is subtracted, so that a perfect prediction has loss 0.
    """
    logits_NV, labels_N = logits_BTV.flatten(0, -2), labels_BT.flatten()
    loss_N, log_z_N = _CrossEntropy.apply(logits_NV, labels_N, label_smoothing)
    cross_entropy = loss_N.sum()
    total = cross_entropy
    if z_loss > 0.0:
        total = total + z_loss * log_z_N.square().sum()
    return TokenLoss(total, cross_entropy, (labels_N != IGNORED_LABEL).sum())


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy and log(Z) of each token in fp32; both 0, and no gradient, where none counts.

    With e spread over the V - 1 other tokens, s = e / (V - 1) and y the label:
    loss = log(Z) - (1 - e - s) logits[y] - s sum(logits) - entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        vocabulary_size = logits_NV.shape[1]
        spread = label_smoothing / (vocabulary_size - 1)
        counts_N = labels_N != IGNORED_LABEL
        labels_N = labels_N.masked_fill(~counts_N, 0)
        log_z_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
        loss_N = torch.empty_like(log_z_N)
        for rows in _row_slices(logits_NV):
            logits_RV = logits_NV[rows].float()
            log_z_N[rows] = logits_RV.logsumexp(-1)
            chosen_R = logits_RV.gather(-1, labels_N[rows, None]).squeeze(-1)
            loss_N[rows] = log_z_N[rows] - chosen_R
            if spread:
                others_R = (log_z_N[rows, None] - logits_RV).sum(-1) - loss_N[rows]
                loss_N[rows] *= 1.0 - label_smoothing
                loss_N[rows] += spread * others_R
        if spread:
            loss_N -= _smoothed_entropy(vocabulary_size, label_smoothing)
        ctx.spread, ctx.on_label = spread, 1.0 - label_smoothing - spread
        ctx.save_for_backward(logits_NV, labels_N, counts_N)
        return loss_N.where(counts_N, 0.0), log_z_N.where(counts_N, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits_NV, labels_N, counts_N = ctx.saved_tensors
        loss_grad_N, log_z_grad_N = (grad.where(counts_N, 0.0) for grad in grads)
        grad_NV = torch.empty_like(logits_NV)
        for rows in _row_slices(logits_NV):
            of_loss_R1 = loss_grad_N[rows, None]
            grad_RV = torch.softmax(logits_NV[rows].float(), -1)
            grad_RV *= of_loss_R1 + log_z_grad_N[rows, None]
            if ctx.spread:
                grad_RV -= ctx.spread * of_loss_R1
            grad_RV.scatter_add_(-1, labels_N[rows, None], -ctx.on_label * of_loss_R1)
            grad_NV[rows] = grad_RV
        return grad_NV, None, None


def _row_slices(logits_NV: Tensor) -> Iterator[slice]:
    if torch.compiler.is_compiling():  # which fuses, and would unroll the loop
        yield slice(None)
        return
    elements = _CPU_ELEMENTS if logits_NV.device.type == "cpu" else _DEVICE_ELEMENTS
    num_rows = max(1, elements // logits_NV.shape[1])
    for first in range(0, len(logits_NV), num_rows):
        yield slice(first, first + num_rows)


def _smoothed_entropy(vocabulary_size: int, label_smoothing: float) -> float:
    spread = label_smoothing / (vocabulary_size - 1)
    return -(
        (1.0 - label_smoothing) * math.log(1.0 - label_smoothing)
        + label_smoothing * math.log(spread)
    )
