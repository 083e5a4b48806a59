"""Layers of a frozen model: they keep for the backward pass what the input's gradient needs.

Axes: B batch, S positions, C input columns, R output rows; `...` any leading axes.

torch keeps nothing for a frozen linear that it computes itself, but DeepSpeed's own keeps the
input, bitsandbytes' too, and a view of a gathered weight would keep the gathered copy alive. Here
a linear keeps a reference to where its weight will be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from softprompt_dist.backbone.flat_weights import Slot


class FrozenLinear(nn.Module):
    """A linear layer whose weight is a slot in its block's run of bytes."""

    def __init__(
        self, in_features: int, out_features: int, *, name: str, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        """The weight's name in the checkpoint."""
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.slot: Slot | None = None

    def forward(self, input_C: Tensor) -> Tensor:
        """[..., C] to [..., R]."""
        # One product of two matrices, however the input lies. Of one that is not contiguous torch
        # makes a batch of products, whose gradient is tens of times less exact for a large head.
        output_R = self._product(input_C.reshape(-1, self.in_features))
        return output_R.view(*input_C.shape[:-1], self.out_features)

    def _product(self, input_NC: Tensor) -> Tensor:
        assert self.slot is not None, f"{self.name} has not been loaded"
        if self.slot.weight_RC is not None:  # torch itself then keeps no more than that
            return F.linear(input_NC, self.slot.weight_RC, self.bias)
        output_NR: Tensor = _FrozenProduct.apply(input_NC, self.slot, self.bias)
        return output_NR


class _FrozenProduct(torch.autograd.Function):
    # `forward` takes ctx itself: with `setup_context` torch inspects the signature at every call.

    @staticmethod
    def forward(ctx: Any, input_C: Tensor, slot: Slot, bias_R: Tensor | None) -> Tensor:
        ctx.slot = slot
        return slot.format.multiply(input_C, slot.bytes_RN, bias_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_R,) = grads
        return ctx.slot.format.multiply_transposed(grad_R, ctx.slot.bytes_RN), None, None


class FrozenRMSNorm(nn.Module):
    """Root mean square norm without mean or bias (T5LayerNorm, LlamaRMSNorm), in one operation."""

    def __init__(self, weight_D: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight_D)
        self.weight: Tensor
        self.epsilon = epsilon

    def forward(self, hidden_D: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        if hidden_D.is_cuda:  # one kernel there, which keeps its input and a number per row
            return F.rms_norm(hidden_D, self.weight.shape, self.weight, self.epsilon)
        normed_D: Tensor = _RMSNorm.apply(hidden_D, self.weight, self.epsilon)
        return normed_D


class _RMSNorm(torch.autograd.Function):
    """Elsewhere torch composes it of operations that keep two fp32 copies of the input."""

    @staticmethod
    def forward(ctx: Any, hidden_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(hidden_D, weight_D)
        ctx.epsilon = epsilon
        return F.rms_norm(hidden_D, weight_D.shape, weight_D, epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden_D, weight_D = ctx.saved_tensors
        (grad_D,) = grads
        wide_D, scaled_D = hidden_D.float(), (grad_D * weight_D).float()
        inverse_rms_1 = torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + ctx.epsilon)
        # y = x / rms(x): what x changes in its own norm is taken off, along x.
        along_1 = (scaled_D * wide_D).mean(-1, keepdim=True) * inverse_rms_1.square()
        return ((scaled_D - wide_D * along_1) * inverse_rms_1).to(grad_D.dtype), None, None


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu_new": (
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
    "gelu": (F.gelu, lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate)),
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "relu": (F.relu, lambda grad, gate: torch.ops.aten.threshold_backward(grad, gate, 0)),
}
_ACTIVATIONS["gelu_pytorch_tanh"] = _ACTIVATIONS["gelu_new"]
_ACTIVATIONS["swish"] = _ACTIVATIONS["silu"]


ACTIVATION_NAMES = tuple(_ACTIVATIONS)


def knows_activation(name: str) -> bool:
    """Whether `activate` and `activate_gated` can compute it."""
    return name in _ACTIVATIONS


def activate(name: str, hidden: Tensor) -> Tensor:
    """The activation by its Hugging Face name; gelu_new is the tanh approximation, fused."""
    return _ACTIVATIONS[name][0](hidden)


def activate_gated(name: str, gate: Tensor, linear: Tensor) -> Tensor:
    """activation(gate) * linear; only the two are kept, the activation is computed again."""
    output: Tensor = _GatedActivation.apply(gate, linear, name)
    return output


class FrozenGatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)), as in Llama."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, hidden_D: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate, linear = self.gate_proj(hidden_D), self.up_proj(hidden_D)
        output_D: Tensor = self.down_proj(activate_gated(self.activation, gate, linear))
        return output_D


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, linear: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, linear)
        ctx.name = name
        return _ACTIVATIONS[name][0](gate) * linear

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        gate, linear = ctx.saved_tensors
        forward, backward = _ACTIVATIONS[ctx.name]
        return backward(grad * linear, gate), grad * forward(gate), None
