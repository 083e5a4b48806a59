"""AdamW whose steps are relative to the size of each matrix, as Adafactor's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from softprompt_dist.run.parameterwise import SMALLEST_PARAMETER_SCALE, ParameterwiseOptimizer


class RmsScaledAdamW(ParameterwiseOptimizer):
    """Adam's step times max(1e-3, RMS(parameter)), so one rate suits T5's matrices of all sizes.

    nanoT5 (Nawrot, 2023) found that this scaling is what lets T5 converge from scratch under Adam.
    Weight decay is multiplied by the plain learning rate. Parameters must be whole on every rank.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        epsilon: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "epsilon": epsilon}
        super().__init__(parameters, defaults)

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Move `parameter` by its gradient, in place, with the settings of its group."""
        grad, state = parameter.grad, self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        rate, decay, epsilon = group["lr"], group["weight_decay"], group["epsilon"]
        state["step"] += 1
        step = float(state["step"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected_epsilon = epsilon * (1 - beta2**step) ** 0.5
        denominator = state["exp_avg_sq"].sqrt().add_(corrected_epsilon)
        scale = max(SMALLEST_PARAMETER_SCALE, float(parameter.square().mean().sqrt()))
        size = rate * scale * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        parameter.mul_(1 - rate * decay)
        parameter.addcdiv_(state["exp_avg"], denominator, value=-size)
