"""Our layers in the place of transformers', wherever their numbers are the same.

Whether they are is found out by trying, not by a class's name.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from softprompt_dist.backbone.layers import (
    ACTIVATION_NAMES,
    FrozenGatedFeedForward,
    FrozenRMSNorm,
    activate_gated,
)

_PROBE_SCALES = (1.0, 1e-3)
"""Of inputs for a norm: one that hides its epsilon and one that shows it."""
_GATED = ("gate_proj", "up_proj", "down_proj")


def replace_norms(model: nn.Module) -> None:
    """Put our fused norm where a module's numbers are just those of a root mean square norm."""
    for module in list(model.modules()):
        for attribute, child in list(module.named_children()):
            epsilon = getattr(child, "variance_epsilon", getattr(child, "eps", None))
            weight = child._buffers.get("weight")  # noqa: SLF001 - not a slot's bytes
            if not type(child).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
                continue
            if _is_plain_rms_norm(child, weight, epsilon):
                setattr(module, attribute, FrozenRMSNorm(weight, epsilon))


@torch.no_grad()
def _is_plain_rms_norm(norm: nn.Module, weight: torch.Tensor, epsilon: float) -> bool:
    """Found out by trying: some norms add one to the weight, or subtract a mean.

    In fp32 and with other weights than its own, which could hide the difference.
    """
    trial = torch.linspace(0.3, 1.7, len(weight), device=weight.device)
    row = torch.linspace(-2, 3, len(weight), device=weight.device).roll(len(weight) // 3)
    expected = FrozenRMSNorm(trial, epsilon)
    norm.register_buffer("weight", trial)
    try:
        rows = [scale * row[None] for scale in _PROBE_SCALES]
        return all(torch.allclose(norm(row), expected(row), rtol=1e-4, atol=1e-5) for row in rows)
    finally:
        norm.register_buffer("weight", weight)


def replace_gated_feed_forwards(model: nn.Module) -> None:
    """Put our gated feed-forward, which keeps two tensors instead of three, in Llama's place."""
    for module in list(model.modules()):
        for attribute, child in list(module.named_children()):
            if set(_GATED) <= dict(child.named_children()).keys():
                activation = _gated_activation(child)
                if activation is not None:
                    gate, up, down = (child.get_submodule(name) for name in _GATED)
                    frozen = FrozenGatedFeedForward(gate, up, down, activation)
                    setattr(module, attribute, frozen)


class _Triple(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * hidden


@torch.no_grad()
def _gated_activation(feed_forward: nn.Module) -> str | None:
    """The activation with which down(activation(gate(x)) * up(x)) gives the module's numbers."""
    probe = copy.copy(feed_forward)
    simple = {"gate_proj": nn.Identity(), "up_proj": _Triple(), "down_proj": nn.Identity()}
    probe.__dict__["_modules"] = {**feed_forward._modules, **simple}  # noqa: SLF001
    row = torch.linspace(-4, 4, 33)[None]
    try:
        found = probe(row)
    except (RuntimeError, TypeError, AttributeError):
        return None  # it does something else with its input
    names = (n for n in ACTIVATION_NAMES if torch.equal(found, activate_gated(n, row, 3 * row)))
    return next(names, None)
