"""Layers that bitsandbytes quantizes: near the whole weight, exact to its own, nothing kept."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from softprompt_dist.backbone.bitsandbytes_linear import (
    LLMInt8Linear,
    Nf4Linear,
    require_bitsandbytes,
)
from softprompt_dist.errors import BackboneError, MachineError

ROWS, COLUMNS = 96, 128
OUTLIERS = (5, 70)

LLMInt8 = partial(LLMInt8Linear, outlier_threshold=6.0)
LLMInt8All = partial(LLMInt8Linear, outlier_threshold=0.0)
LAYERS = {"llm_int8": LLMInt8, "llm_int8 without outliers": LLMInt8All, "nf4": Nf4Linear}
BUFFER_BYTES = {  # one fp32 scale per row; 4 bits a weight and one fp32 scale per 64 weights
    "llm_int8": ROWS * (COLUMNS + 4),
    "llm_int8 without outliers": ROWS * (COLUMNS + 4),
    "nf4": ROWS * COLUMNS // 2 + ROWS * COLUMNS // 64 * 4,
}
DTYPES = [torch.float32, torch.bfloat16]

each_layer = pytest.mark.parametrize("kind", LAYERS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_probe() -> Iterator[None]:
    require_bitsandbytes.cache_clear()
    yield
    require_bitsandbytes.cache_clear()


def make_weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.1


def make_input(*, outlier: float = 20.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 9, C] of unit variance, with two columns that are `outlier` times as wide."""
    values = torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(2))
    values[..., OUTLIERS] *= outlier
    return values.to(dtype)


def gradient_at_input(layer: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    values = values.clone().requires_grad_()
    output = layer(values)
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    output.backward(seed.to(output.dtype))
    assert values.grad is not None
    return values.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def bytes_of(module: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


@each_dtype
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    # Half as much again as the error seen, 0.008, 0.021 and 0.091.
    [("llm_int8", 0.012), ("llm_int8 without outliers", 0.031), ("nf4", 0.137)],
)
def test_output_is_near_that_of_the_whole_weight(
    kind: str, tolerance: float, dtype: torch.dtype
) -> None:
    weight, bias, values = make_weight(), torch.linspace(-1, 1, ROWS), make_input()

    output = LAYERS[kind](weight, bias, dtype=dtype)(values.to(dtype))

    assert output.dtype == dtype
    assert output.shape == (2, 9, ROWS)
    assert 0 < relative_error(output, linear(values, weight, bias)) < tolerance


@each_dtype
@pytest.mark.parametrize(("kind", "tolerance"), [("llm_int8", 0.012), ("nf4", 0.137)])
def test_gradient_is_near_that_of_the_whole_weight(
    kind: str, tolerance: float, dtype: torch.dtype
) -> None:
    weight = make_weight()

    gradient = gradient_at_input(LAYERS[kind](weight, None, dtype=dtype), make_input(dtype=dtype))

    assert gradient.dtype == dtype
    whole = gradient_at_input(partial(linear, weight=weight), make_input())
    assert 0 < relative_error(gradient, whole) < tolerance


@each_dtype
def test_nf4_is_to_the_bit_a_linear_by_what_bitsandbytes_dequantizes(dtype: torch.dtype) -> None:
    weight, values = make_weight(), make_input(dtype=dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    state.dtype = dtype
    dequantized = functional.dequantize_4bit(packed, state)

    layer = Nf4Linear(weight, None, dtype=dtype)

    assert torch.equal(layer(values), linear(values, dequantized))
    exact = gradient_at_input(partial(linear, weight=dequantized), values)
    assert torch.equal(gradient_at_input(layer, values), exact)


@each_dtype
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_is_to_the_bit_what_bitsandbytes_computes(
    threshold: float, dtype: torch.dtype
) -> None:
    weight, values = make_weight(), make_input(dtype=dtype)
    quantized, scale, _ = functional.int8_vectorwise_quant(weight.half())
    state = bitsandbytes.MatmulLtState(CB=quantized, SCB=scale)
    state.has_fp16_weights = False
    state.is_training = False  # else, on a CPU, it leaves the input as it is
    theirs = partial(bitsandbytes.matmul, B=quantized, state=state, threshold=threshold)

    ours = LLMInt8Linear(weight, None, dtype=dtype, outlier_threshold=threshold)

    assert torch.equal(ours(values), theirs(values))
    assert torch.equal(gradient_at_input(ours, values), gradient_at_input(theirs, values))


def test_llm_int8_gradient_is_a_product_with_what_bitsandbytes_dequantizes() -> None:
    weight, values = make_weight(), make_input()
    quantized, scale, _ = functional.int8_vectorwise_quant(weight.half())
    dequantized = functional.int8_vectorwise_dequant(quantized, scale)

    gradient = gradient_at_input(LLMInt8(weight, None, dtype=torch.float32), values)

    exact = gradient_at_input(partial(linear, weight=dequantized), values)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_llm_int8_multiplies_outliers_unrounded() -> None:
    weight, values = make_weight(), torch.zeros(1, 4, COLUMNS)
    values[..., OUTLIERS] = make_input(outlier=1.0)[:1, :4, OUTLIERS].abs() + 6  # all columns count
    quantized, scale, _ = functional.int8_vectorwise_quant(weight.half())
    exact = linear(values, functional.int8_vectorwise_dequant(quantized, scale))

    of_outliers = LLMInt8(weight, None, dtype=torch.float32)(values)
    of_none = LLMInt8All(weight, None, dtype=torch.float32)(values)

    assert relative_error(of_outliers, exact) < 1e-6
    assert relative_error(of_none, exact) > 1e-4


def test_llm_int8_multiplies_outliers_that_fp16_cannot_hold() -> None:
    weight, values = make_weight(), make_input(outlier=1e6)

    output = LLMInt8(weight, None, dtype=torch.float32)(values)

    assert relative_error(output, linear(values, weight)) < 0.012


@each_layer
def test_rows_and_tokens_of_zeros_stay_zeros(kind: str) -> None:
    weight, values = make_weight(), make_input()
    weight[3] = 0
    values[:, 4] = 0

    layer = LAYERS[kind](weight, None, dtype=torch.float32)
    output = layer(values)

    assert torch.equal(output[..., 3], torch.zeros(2, 9))
    assert torch.equal(output[:, 4], torch.zeros(2, ROWS))
    assert gradient_at_input(layer, values).isfinite().all()


@each_layer
def test_backward_needs_nothing_but_the_layer(kind: str) -> None:
    layer = LAYERS[kind](make_weight(), torch.zeros(ROWS), dtype=torch.float32)
    values = make_input().requires_grad_()
    kept: list[Tensor] = []

    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(values)

    assert kept == []
    # Nor does the node hold a tensor in an attribute of its own, as bitsandbytes' nodes do.
    assert {type(held) for held in vars(output.grad_fn).values()} == {type(layer)}
    assert {id(t) for t in vars(layer).values() if isinstance(t, Tensor)} == set()


@each_layer
def test_only_the_quantized_weight_is_held(kind: str) -> None:
    layer = LAYERS[kind](make_weight(), None, dtype=torch.float32)
    held_at_first = bytes_of(layer)

    gradient_at_input(layer, make_input())

    assert list(layer.parameters()) == []
    assert held_at_first == bytes_of(layer) == BUFFER_BYTES[kind]


@each_layer
def test_bias_is_a_buffer_in_the_layers_dtype(kind: str) -> None:
    bias = nn.Parameter(torch.linspace(-1, 1, ROWS))

    layer = LAYERS[kind](nn.Parameter(make_weight()), bias, dtype=torch.bfloat16)

    assert layer.bias.dtype == torch.bfloat16
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    assert not layer(make_input(dtype=torch.bfloat16)).requires_grad


@each_layer
def test_input_of_another_dtype_is_cast_and_its_gradient_cast_back(kind: str) -> None:
    layer = LAYERS[kind](make_weight(), None, dtype=torch.bfloat16)

    assert layer(make_input()).dtype == torch.bfloat16
    assert gradient_at_input(layer, make_input()).dtype == torch.float32


@each_layer
def test_casting_the_whole_model_leaves_the_weight_as_it_is(kind: str) -> None:
    layer = LAYERS[kind](make_weight(), None, dtype=torch.float32)

    cast = copy.deepcopy(layer).bfloat16()

    assert torch.equal(cast(make_input()), layer(make_input()))


@pytest.mark.parametrize("kind", ["llm_int8", "nf4"])
@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.zeros(4), r"\[4\]"),
        (torch.zeros(2, 3, 4), r"\[2, 3, 4\]"),
        (torch.zeros(4, 4, dtype=torch.int8), "int8"),
    ],
)
def test_what_is_no_floating_point_matrix_is_refused(kind: str, weight: Tensor, named: str) -> None:
    with pytest.raises(BackboneError, match=f"quantization={kind} .*{named}"):
        LAYERS[kind](weight, None, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llm_int8", "nf4"])
def test_missing_library_is_named_with_its_remedies(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(MachineError) as raised:
        LAYERS[kind](make_weight(), None, dtype=torch.float32)

    message = str(raised.value)
    assert f"backbone.quantization is {kind!r}" in message
    assert "pip install 'softprompt-dist[gpu]'" in message
    assert "backbone.quantization=int8" in message


def test_library_without_kernels_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\n  library not available.\n  Run python -m bitsandbytes.")

    monkeypatch.setattr(functional, "quantize_4bit", fail)

    with pytest.raises(MachineError, match=r"device 'cpu' \(library not available.\)") as raised:
        require_bitsandbytes("nf4", "cpu")

    assert "backbone.quantization=int8" in str(raised.value)
