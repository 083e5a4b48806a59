"""Optimizer and learning rate of LM adaptation."""

from __future__ import annotations

import math

import torch
from torch import nn

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.run.optimizer import T5XAdafactor
from softprompt_dist.run.rms_scaled_adamw import RmsScaledAdamW


def build_optimizer(config: AdaptConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` names; its rate is set before every update."""
    rate = learning_rate_at(config, 0)
    if config.optimizer == "adafactor":
        return T5XAdafactor(
            parameters, rate, weight_decay=config.weight_decay, multiply_by_parameter_scale=True
        )
    if config.optimizer == "rms_scaled_adamw":
        return RmsScaledAdamW(parameters, rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay)


def learning_rate_at(config: AdaptConfig, update: int) -> float:
    """Learning rate of update number `update` (from 0)."""
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
