"""What the optimisers written here share: every parameter is updated by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SMALLEST_PARAMETER_SCALE = 1e-3
"""Where steps are relative to a parameter's root mean square, it counts as at least this."""


class ParameterwiseOptimizer(torch.optim.Optimizer):
    """An optimiser whose update of a parameter depends on that parameter's state alone."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)
        return loss

    @abstractmethod
    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Move `parameter` by its gradient, in place, with the settings of its group."""
