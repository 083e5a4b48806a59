"""AdamW, plain or relative to the size of each matrix, on stretches of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.adaptation.fragments import Fragment
from softprompt_dist.adaptation.sharded_optimizer import (
    SMALLEST_SCALE,
    ShardedOptimizer,
    squared_sum,
)
from softprompt_dist.adaptation.sharded_tensor import ShardedTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW(ShardedOptimizer):
    """Adam with decoupled weight decay; its two moments lie like the weights.

    With `rms_scaled` the step is multiplied by max(1e-3, RMS(parameter)), so that one rate suits
    T5's matrices of all sizes. nanoT5 (Nawrot, 2023) found that this scaling, not the factoring, is
    what lets T5 converge from scratch. The root mean square is the whole parameter's, on any number
    of ranks. Weight decay is multiplied by the plain learning rate.
    """

    def __init__(  # noqa: PLR0913 - the hyperparameters of the original
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        rms_scaled: bool,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        epsilon: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "epsilon": epsilon}
        super().__init__(parameters, defaults)
        self.rms_scaled = rms_scaled

    def update(self, flat: Tensor, fragments: list[Fragment], group: dict[str, Any]) -> None:
        """Move the fragments of `flat` by its gradient, which becomes Adam's step."""
        assert flat.grad is not None
        step = self._adam_step(flat, group)
        squares = torch.stack(
            [squared_sum(f.of(values)) for values in (flat.data, step) for f in fragments]
        )
        weights, steps = self.sum_over_ranks(squares).view(2, -1).tolist()
        changes = []
        for fragment, weight, squared in zip(fragments, weights, steps, strict=True):
            rms = (weight / fragment.numel) ** 0.5
            size = group["lr"] * (max(SMALLEST_SCALE, rms) if self.rms_scaled else 1.0)
            values = fragment.of(flat.data)
            if group["weight_decay"]:
                values.mul_(1.0 - group["lr"] * group["weight_decay"])
            values.add_(fragment.of(step), alpha=-size)
            changes.append(squared * size**2)
        self.record(fragments, changes, weights)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Both moments of every parameter."""
        return {
            f"{name}.{moment}": tensor
            for index, moment in enumerate(_MOMENTS)
            for name, tensor in self.layout.tensors(
                lambda flat, index=index: self._moments_of(flat)[index]  # type: ignore[misc]
            ).items()
        }

    def small_state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def _adam_step(self, flat: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's step at rate 1, in the place of the gradient."""
        gradient = flat.grad
        assert gradient is not None
        average, square = self._moments_of(flat)
        beta1, beta2 = group["betas"]
        average.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        correction = 1.0 - beta2**self.num_updates
        torch.sqrt(square, out=gradient)
        gradient.div_(correction**0.5).add_(group["epsilon"])
        torch.div(average, gradient, out=gradient)
        return gradient.div_(1.0 - beta1**self.num_updates)

    def _moments_of(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[flat]
        if not state:
            state.update({name: torch.zeros_like(flat, requires_grad=False) for name in _MOMENTS})
        return state[_MOMENTS[0]], state[_MOMENTS[1]]
