"""Frozen linear layers of a replicated backbone that bitsandbytes quantizes and multiplies by.

Axes: R output rows, C input columns, N tokens of a call; `...` any leading axes.

bitsandbytes computes; what is kept is ours: its own 8-bit layer keeps the input, which a frozen
weight has no use for. Only the quantized weight stays, as integers, and its scales as bytes: a cast
of the whole model (`model.bfloat16()`) would round floating-point buffers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.errors import BackboneError, MachineError

_NF4_RUN = 64
"""Neighbouring weights that share a scale; bitsandbytes' default and QLoRA's choice."""


@cache
def require_bitsandbytes(quantization: str, device_type: str) -> None:
    """Make sure that bitsandbytes is there and quantizes on this kind of device, by doing it.

    Args:
        quantization: the value of `backbone.quantization` that asks for it, for the message.
        device_type: "cuda", "cpu", ...

    Raises:
        MachineError: bitsandbytes is missing, is broken, or has no kernels for the device.
    """
    # At its import it tells of an inference kernel for CPUs that nothing here would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except Exception as error:  # whatever a broken installation raises, the remedy is the same
        raise MachineError(
            f"backbone.quantization is {quantization!r}, but bitsandbytes cannot be imported "
            f"({_first_line(error)}). Install it with pip install 'softprompt-dist[gpu]', or set "
            "backbone.quantization=int8, which needs no library."
        ) from error
    try:
        # A library without kernels for the device imports well and fails when first used.
        sample = torch.ones(2, 64, dtype=torch.float16, device=device_type)
        bitsandbytes.functional.int8_vectorwise_quant(sample)
        bitsandbytes.functional.quantize_4bit(sample, quant_type="nf4")
    except (RuntimeError, NotImplementedError) as error:
        raise MachineError(
            f"backbone.quantization is {quantization!r}, but bitsandbytes "
            f"{bitsandbytes.__version__} cannot quantize on device {device_type!r} "
            f"({_first_line(error)}). Install a build for it (python -m bitsandbytes tells which "
            "is there), or set backbone.quantization=int8, which needs no library."
        ) from error


class _BitsAndBytesLinear(nn.Module, ABC):
    """A frozen linear layer that holds its weight in a form of bitsandbytes' own."""

    quantization: str
    bias: Tensor | None

    def __init__(self, weight_RC: Tensor, bias_R: Tensor | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        if weight_RC.dim() != 2 or not weight_RC.is_floating_point():
            raise BackboneError(
                f"backbone.quantization={self.quantization} was given a weight of shape "
                f"{list(weight_RC.shape)} in {weight_RC.dtype}; it quantizes floating-point "
                "matrices [rows, columns]. Set backbone.quantization=none for this model."
            )
        self.out_features, self.in_features = weight_RC.shape
        self.dtype = dtype
        """Of input, output and the gradient between."""
        self.register_buffer("bias", None if bias_R is None else bias_R.detach().to(dtype))
        require_bitsandbytes(self.quantization, weight_RC.device.type)
        self._quantize(weight_RC.detach())

    def forward(self, input_C: Tensor) -> Tensor:
        """[..., C] to [..., R], in the layer's dtype."""
        output_R: Tensor = _FrozenProduct.apply(input_C.to(self.dtype), self)
        return output_R

    def extra_repr(self) -> str:
        """Shape and dtype, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.dtype}"

    @abstractmethod
    def _quantize(self, weight_RC: Tensor) -> None:
        """Keep the weight in the library's form."""

    @abstractmethod
    def _multiply(self, input_C: Tensor) -> Tensor:
        """[..., C] to [..., R]."""

    @abstractmethod
    def _dequantize(self) -> Tensor:
        """weight_RC in floating point."""


class _FrozenProduct(torch.autograd.Function):
    # `forward` takes ctx itself: with `setup_context` torch inspects the signature at every call.

    @staticmethod
    def forward(ctx: Any, input_C: Tensor, layer: _BitsAndBytesLinear) -> Tensor:
        ctx.layer = layer
        return layer._multiply(input_C)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_R,) = grads
        return grad_R @ ctx.layer._dequantize(), None


class LLMInt8Linear(_BitsAndBytesLinear):
    """LLM.int8(): weight and input in int8, except for the input's outlier columns.

    Of the weight, each output row is quantized by its greatest magnitude (127 stands for it); of
    the input, each token. Both are rounded to fp16 first. An input column in which any token of
    the call reaches `outlier_threshold` is an outlier: it is multiplied in `dtype` by its column of
    the de-quantized weight, so that it neither widens the scale of the other columns nor is
    rounded itself. Which columns these are depends on all tokens of the call, hence a row's output,
    by a rounding error, on its neighbours in the batch. With threshold 0 there are no outliers, and
    an input beyond fp16's 65504 gives no finite output. The gradient passes the rounding of the
    input as if it were not there.

    On CUDA bitsandbytes rounds the product to fp16, whatever `dtype`: an output beyond 65504 is
    infinite. T5's second feed-forward matrix comes near that; see `backbone.quantized_layers`.

    Source: Dettmers et al. 2022, "LLM.int8()", section 3.

    Args:
        weight_RC: floating-point, on the device where the layer stays.
        bias_R: kept in `dtype`.
        dtype: of input, output and the gradient between.
        outlier_threshold: magnitude from which an input counts as an outlier; 0 for none.

    Raises:
        BackboneError: the weight is no floating-point matrix.
        MachineError: bitsandbytes is missing or has no kernels for the device.
    """

    quantization = "llm_int8"
    quantized_RC: Tensor
    scale_bytes: Tensor

    def __init__(
        self,
        weight_RC: Tensor,
        bias_R: Tensor | None,
        *,
        dtype: torch.dtype,
        outlier_threshold: float,
    ) -> None:
        super().__init__(weight_RC, bias_R, dtype=dtype)
        self.outlier_threshold = outlier_threshold

    @property
    def scale_R(self) -> Tensor:  # noqa: N802
        """Greatest magnitude of each row, fp32."""
        return self.scale_bytes.view(torch.float32)

    def _quantize(self, weight_RC: Tensor) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        half_RC = weight_RC.to(torch.float16).contiguous()  # all that the CUDA kernel takes
        quantized_RC, scale_R, _ = int8_vectorwise_quant(half_RC)
        self.register_buffer("quantized_RC", quantized_RC)
        self.register_buffer("scale_bytes", scale_R.view(torch.uint8))

    def _multiply(self, input_C: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        input_NC = input_C.reshape(-1, self.in_features).contiguous()
        int8_NC, scale_N, outlier_columns = int8_vectorwise_quant(
            input_NC.to(torch.float16), threshold=self.outlier_threshold
        )
        # What `bitsandbytes.matmul` comes to; that function warns at every input that is not fp16,
        # and on a CPU quantizes no input unless told that it is not training.
        output_NR, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            input_NC,
            int8_NC,
            self.quantized_RC,
            scale_N,
            self.scale_R,
            outlier_columns,
            self.bias,
        )
        return output_NR.view(*input_C.shape[:-1], self.out_features)

    def _dequantize(self) -> Tensor:
        # As in bitsandbytes' own backward pass. `int8_vectorwise_dequant` would make two copies of
        # the weight in fp32 on the way.
        return self.quantized_RC.to(self.dtype, copy=True).mul_(self.scale_R[:, None] * (1 / 127))


class Nf4Linear(_BitsAndBytesLinear):
    """NF4: the weight in 4 bits, the input as it is.

    Runs of 64 neighbouring weights share one fp32 scale, their greatest magnitude; each weight
    becomes the nearest of 16 numbers that are quantiles of a normal distribution. 4.5 bits a weight
    in all: scales are not themselves quantized. There is no treatment of outliers; an outlier among
    the weights costs precision in its run alone, one in the input costs none.

    Source: Dettmers et al. 2023, "QLoRA", section 3.

    Args:
        weight_RC: floating-point, on the device where the layer stays.
        bias_R: kept in `dtype`.
        dtype: of input, output, the gradient between, and the weight while it is multiplied by.

    Raises:
        BackboneError: the weight is no floating-point matrix.
        MachineError: bitsandbytes is missing or has no kernels for the device.
    """

    quantization = "nf4"
    packed: Tensor
    scale_bytes: Tensor

    def _quantize(self, weight_RC: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight_RC, blocksize=_NF4_RUN, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("scale_bytes", state.absmax.view(torch.uint8))

    def _multiply(self, input_C: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        output_R: Tensor = matmul_4bit(input_C, self.packed, self._state, bias=self.bias)
        return output_R

    def _dequantize(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight_RC: Tensor = dequantize_4bit(self.packed, self._state)
        return weight_RC

    @property
    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        # Made anew at each call, so that it follows the buffers to wherever the module is moved.
        return QuantState(
            absmax=self.scale_bytes.view(torch.float32),
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=_NF4_RUN,
            quant_type="nf4",
            dtype=self.dtype,
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
