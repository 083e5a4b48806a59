"""The learning rate of every update."""

from __future__ import annotations

import math

from softprompt_dist.adapt_config import AdaptConfig


def learning_rate_at(config: AdaptConfig, update: int) -> float:
    """Learning rate of update number `update` (from 0).

    `rsqrt` is Mesh-TF's `learning_rate_schedule_noam` and T5X's `constant * rsqrt_decay`, on a
    clock that goes on where pre-training stopped (`start_step`).
    """
    if config.schedule == "rsqrt":
        clock = max(update + config.start_step, config.warmup_steps, 1)
        rate = config.learning_rate / math.sqrt(clock)
    else:
        rate = config.learning_rate * min(1.0, (update + 1) / max(config.warmup_steps, 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, update / config.steps)))
    if config.decay_steps:
        rate *= min(1.0, max(0, config.steps - update) / config.decay_steps)
    return rate
