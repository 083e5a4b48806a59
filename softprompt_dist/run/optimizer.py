"""The optimisers: T5X's Adafactor, which the paper used, and AdamW; their state as plain tensors.

Adafactor here differs from other PyTorch versions in four ways, each as in T5X (`adafactor.py`):
the second moment is factored only where the two largest axes are both at least 128; the decay rate
follows the global step, in float32; weight decay is not multiplied by the learning rate; the update
is clipped by its root mean square over the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softprompt_dist.config import OptimizerConfig
from softprompt_dist.errors import CheckpointError, ConfigError

SMALLEST_FACTORED_AXIS = 128
SMALLEST_LEARNING_RATE = 1e-8
_SMALLEST_PARAMETER_SCALE = 1e-3
"""Where steps are relative to a parameter's root mean square, it counts as at least this."""


class T5XAdafactor(torch.optim.Optimizer):
    """Adafactor without momentum (Shazeer and Stern, 2018) exactly as T5X computes it.

    Moments are float32 whatever the parameter's dtype. `lr` may be changed between updates through
    `param_groups`. Parameters must be whole on every rank: over a shard, clipping is not the same.

    Args:
        parameters: tensors or parameter groups; each tensor has its own clipping and moments.
        lr: learning rate.
        decay_rate: the moments' decay is 1 - (step - step_offset + 1) ** -decay_rate.
        start_step: step number of the first update.
        step_offset: subtracted from the step number in the decay.
        clipping_threshold: largest root mean square of an update before lr; None: unlimited.
        weight_decay: share of the parameter taken away by each update.
        multiply_by_parameter_scale: whether lr is relative to the parameter's root mean square.
        epsilon: added to the squared gradient.

    Raises:
        ConfigError: `start_step` lies before `step_offset`, where the decay rate is not defined.
    """

    def __init__(  # noqa: PLR0913 - the hyperparameters of the original
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        decay_rate: float = 0.8,
        start_step: int = 0,
        step_offset: int = 0,
        clipping_threshold: float | None = 1.0,
        weight_decay: float = 0.0,
        multiply_by_parameter_scale: bool = False,
        epsilon: float = 1e-30,
    ) -> None:
        if start_step < step_offset:
            raise ConfigError(
                f"optimizer.step_offset is {step_offset} but must not exceed optimizer.start_step "
                f"({start_step}), else the decay rate is undefined. Lower it or raise start_step."
            )
        defaults = {
            "lr": lr,
            "decay_rate": decay_rate,
            "first_step": start_step - step_offset,
            "clipping_threshold": clipping_threshold,
            "weight_decay": weight_decay,
            "multiply_by_parameter_scale": multiply_by_parameter_scale,
            "epsilon": epsilon,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_initial_state(parameter))
                _update(parameter, state, group)
        return loss


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser that `config` names; its learning rate is that of update 0."""
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate_at(config, 0),
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
    return T5XAdafactor(
        parameters,
        learning_rate_at(config, 0),
        decay_rate=config.decay_rate,
        start_step=config.start_step,
        step_offset=config.step_offset,
        clipping_threshold=config.clipping_threshold,
        weight_decay=config.weight_decay,
        multiply_by_parameter_scale=config.multiply_by_parameter_scale,
    )


def learning_rate_at(config: OptimizerConfig, update: int) -> float:
    """Learning rate of the run's update number `update` (from 0): constant after linear warm-up.

    As in T5X update 0 of a warm-up has the smallest rate, 1e-8. Warm-up starts with the run, and so
    does the linear decay, where there is one.
    """
    share = min(1.0, update / config.warmup_steps) if config.warmup_steps else 1.0
    if config.linear_decay_steps is not None:
        share *= max(0.0, 1.0 - update / config.linear_decay_steps)
    return max(config.learning_rate * share, SMALLEST_LEARNING_RATE)


def optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter number>.<name>` -> contiguous copy on the CPU."""
    return {
        f"{number}.{name}": value.detach().to("cpu", copy=True).contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def optimizer_from_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore, bit for bit, what `optimizer_to_tensors` gave.

    Nothing is changed unless everything fits. Hyperparameters are not part of the state.

    Raises:
        CheckpointError: the state is not that of this kind of optimiser over these shapes.
    """
    parameters = _parameters(optimizer)
    states: list[dict[str, Tensor]] = [{} for _ in parameters]
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise CheckpointError(
                f"The checkpoint holds {key!r}, but this optimiser has {len(parameters)} "
                "parameters. Resume with the recipe that wrote the checkpoint."
            )
        device = torch.device("cpu") if name == "step" else parameters[int(number)].device
        states[int(number)][name] = value.to(device, copy=True)
    for index, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
        _check_state(index, state, _expected_shapes(optimizer, parameter))
    optimizer.state.clear()
    optimizer.state.update({p: state for p, state in zip(parameters, states, strict=True) if state})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _expected_shapes(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, torch.Size]:
    if isinstance(optimizer, T5XAdafactor):
        return {name: value.shape for name, value in _initial_state(parameter, "meta").items()}
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def _check_state(
    number: int, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> None:
    found = {name: value.shape for name, value in state.items()}
    if found and found != expected:
        raise CheckpointError(
            f"The checkpoint's state of parameter {number} has {_shapes(found)}, but this "
            f"optimiser keeps {_shapes(expected)}. Resume with the recipe that wrote it."
        )


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _initial_state(parameter: Tensor, device: str | None = None) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.int64, device=device)
    zeros = torch.zeros_like(parameter, dtype=torch.float32, device=device, requires_grad=False)
    axes = _factored_axes(parameter.shape)
    if axes is None:
        return {"step": step, "v": zeros.contiguous()}
    smaller, larger = axes
    return {"step": step, "v_row": zeros.sum(larger), "v_col": zeros.sum(smaller)}


def _factored_axes(shape: torch.Size) -> tuple[int, int] | None:
    """The second largest and the largest axis, or None where the second moment is kept full."""
    if len(shape) < 2:
        return None
    *_, smaller, larger = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (smaller, larger) if shape[smaller] >= SMALLEST_FACTORED_AXIS else None


def _update(parameter: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
    gradient = parameter.grad.float()  # type: ignore[union-attr]
    weight = parameter.float()
    beta2 = second_moment_decay(group["first_step"] + int(state["step"]), group["decay_rate"])
    update = _normalise(gradient, state, beta2, group["epsilon"])
    if group["clipping_threshold"] is not None:
        update /= torch.clamp(_rms(update) / group["clipping_threshold"], min=1.0)
    if group["multiply_by_parameter_scale"]:
        update *= torch.clamp(_rms(weight), min=_SMALLEST_PARAMETER_SCALE)
    update *= group["lr"]
    parameter.copy_(weight * (1.0 - group["weight_decay"]) - update)
    state["step"] += 1


def second_moment_decay(step: int, decay_rate: float) -> float:
    """Adafactor's decay of its second moments at update number `step` (from 0)."""
    # In float32, exponent included, as the original: at step 1.1e6 1 - beta2 keeps only 8 bits.
    power = np.float32(float(step + 1) ** -float(np.float32(decay_rate)))
    return float(np.float32(1.0) - power)


def _normalise(gradient: Tensor, state: dict[str, Tensor], beta2: float, epsilon: float) -> Tensor:
    """`gradient` over the root of its running second moment, which is brought up to date."""
    square = gradient.square() + epsilon
    if "v" in state:
        state["v"].mul_(beta2).add_(square, alpha=1.0 - beta2)
        return gradient * state["v"].rsqrt()
    smaller, larger = _factored_axes(gradient.shape)  # type: ignore[misc]
    row, col = state["v_row"], state["v_col"]
    row.mul_(beta2).add_(square.mean(larger), alpha=1.0 - beta2)
    col.mul_(beta2).add_(square.mean(smaller), alpha=1.0 - beta2)
    axis_in_row = smaller - 1 if larger < smaller else smaller
    row_factor = (row / row.mean(axis_in_row, keepdim=True)).rsqrt()
    return gradient * row_factor.unsqueeze(larger) * col.rsqrt().unsqueeze(smaller)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
