"""The loss of T5X (`losses.py`). Axes: B batch, T target tokens, V vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt_dist.data.batching import IGNORED_LABEL


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
    counts_BT = labels_BT != IGNORED_LABEL
    logits_BTV = logits_BTV.float()
    labels_BT = labels_BT.masked_fill(~counts_BT, 0)
    log_z_BT = logits_BTV.logsumexp(dim=-1)
    loss_BT = log_z_BT - logits_BTV.gather(-1, labels_BT[..., None]).squeeze(-1)
    if label_smoothing > 0.0:
        others_BT = (log_z_BT[..., None] - logits_BTV).sum(dim=-1) - loss_BT
        spread = label_smoothing / (logits_BTV.shape[-1] - 1)
        entropy = _smoothed_entropy(logits_BTV.shape[-1], label_smoothing)
        loss_BT = (1.0 - label_smoothing) * loss_BT + spread * others_BT - entropy
    cross_entropy = _sum(loss_BT, counts_BT)
    total = cross_entropy
    if z_loss > 0.0:
        total = total + z_loss * _sum(log_z_BT.square(), counts_BT)
    return TokenLoss(total, cross_entropy, counts_BT.sum())


def _smoothed_entropy(vocabulary_size: int, label_smoothing: float) -> float:
    spread = label_smoothing / (vocabulary_size - 1)
    return -(
        (1.0 - label_smoothing) * math.log(1.0 - label_smoothing)
        + label_smoothing * math.log(spread)
    )


def _sum(values_BT: Tensor, counts_BT: Tensor) -> Tensor:
    return torch.where(counts_BT, values_BT, 0.0).sum()
