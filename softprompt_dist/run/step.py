"""One update of the prompt.

Axes: B batch, P prompt, D model width, T target tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.errors import NonFiniteLossError
from softprompt_dist.lifecycle.watchdog import tick
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.loss import token_loss


def accumulate_gradient(
    backbone: Backbone,
    prompt: SoftPrompt,
    batches: Sequence[TokenBatch],
    z_loss: float,
    *,
    arrive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """All ranks: put the gradient of the loss per token, over all ranks' batches, into the prompt.

    The loss is the sum over target tokens divided by their number over all ranks (not the mean of
    the ranks' means), so the gradient does not depend on how the global batch is dealt.

    Args:
        backbone: the frozen model.
        prompt: what the gradient is of.
        batches: this rank's micro-batches.
        z_loss: weight of log(Z)^2.
        arrive: called once this rank has done what it does without the others.

    Returns:
        `loss` (with z-loss) and `cross_entropy` per token in nats, `num_tokens`, `gradient_norm`.

    Raises:
        NonFiniteLossError: on all ranks together, before any update.
    """
    prompt.weight.grad = None
    sums = torch.zeros(3, dtype=torch.float64, device=prompt.weight.device)
    if backbone.sharded:
        arrive()
    for batch in batches:
        logits_BTV = backbone(prompt(len(batch.input_ids_BS), backbone.dtype), batch)
        labels_BT = ranks.sent(batch.labels_BT, logits_BTV.device)
        loss = token_loss(logits_BTV, labels_BT, z_loss=z_loss)
        loss.total.backward()
        tick()
        sums += torch.stack([loss.total, loss.cross_entropy, loss.num_tokens]).detach().double()
    backbone.release()
    if not backbone.sharded:
        arrive()
    return _mean_over_ranks(prompt, sums)


def _mean_over_ranks(prompt: SoftPrompt, sums: torch.Tensor) -> dict[str, float]:
    """All ranks: divide what the ranks have added up by the tokens of them all; the metrics."""
    gradient_PD = prompt.weight.grad
    assert gradient_PD is not None
    ranks.all_reduce_sum(gradient_PD)
    total, cross_entropy, num_tokens = ranks.all_reduce_sum(sums).tolist()
    gradient_PD /= num_tokens
    gradient_norm = float(gradient_PD.norm())
    if not (math.isfinite(total) and math.isfinite(gradient_norm)):
        raise NonFiniteLossError(
            f"The loss is {total / num_tokens} and the gradient's norm {gradient_norm}; both must "
            "be finite. The update was not applied. Lower optimizer.learning_rate, or look at the "
            "batch of this step."
        )
    return {
        "loss": total / num_tokens,
        "cross_entropy": cross_entropy / num_tokens,
        "num_tokens": num_tokens,
        "gradient_norm": gradient_norm,
    }
