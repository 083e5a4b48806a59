"""Layers of a frozen model: the numbers of torch's own, and nothing kept but what is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from transformers.activations import ACT2FN

from softprompt_dist.backbone.flat_weights import FrozenBlock
from softprompt_dist.backbone.formats import Int8Rows, PlainRows, RowFormat
from softprompt_dist.backbone.layers import (
    FrozenLinear,
    FrozenRMSNorm,
    activate,
    activate_gated,
    knows_activation,
)

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "silu", "swish", "relu")
FORMATS = {"fp32": PlainRows(torch.float32), "int8": Int8Rows()}


def block_of(format: RowFormat, weight_RC: Tensor, bias_R: Tensor | None) -> FrozenBlock:
    """A block that is one linear layer."""
    num_rows, num_columns = weight_RC.shape
    linear = FrozenLinear(num_columns, num_rows, name="w", bias=bias_R)
    block = FrozenBlock(linear)
    linear.slot = block.add_slot("w", format, num_rows, num_columns)
    block.hold(nn.Parameter(format.encode(weight_RC).view(-1), requires_grad=False))
    return block


def gathered(block: FrozenBlock) -> FrozenBlock:
    """As under ZeRO-3: the weight is there for a while, so nobody may keep it."""
    for slot in block.slots:
        slot.weight_RC = None
    return block


def exact_weight(block: FrozenBlock, format: RowFormat) -> Tensor:
    (slot,) = block.slots
    if isinstance(format, PlainRows):
        return slot.bytes_RN.view(format.dtype).double()
    quantized_RC, scale_R = Int8Rows.split(slot.bytes_RN)
    return quantized_RC.double() * scale_R.double()[:, None]


def gradient(function: Callable[[Tensor], Tensor], value: Tensor, seed: int = 1) -> Tensor:
    """Of `value`, for a random gradient of the output; the same for every dtype."""
    value = value.detach().requires_grad_(True)
    output = function(value)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    assert value.grad is not None
    return value.grad


def kept(function: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors that autograd keeps for the backward pass."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert function().requires_grad
    return tensors


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["gathered", "whole"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_is_that_of_fp64(name: str, whole: bool, with_bias: bool) -> None:
    torch.manual_seed(0)
    format, bias_R = FORMATS[name], torch.randn(5) if with_bias else None
    block = block_of(format, torch.randn(5, 9), bias_R)
    if not whole:
        gathered(block)
    input_BC = torch.randn(2, 3, 9)
    weight_RC = exact_weight(block, format)

    def reference(value: Tensor) -> Tensor:
        return F.linear(value, weight_RC, None if bias_R is None else bias_R.double())

    close = {"rtol": 1e-5, "atol": 1e-5}
    expected = reference(input_BC.double())
    torch.testing.assert_close(block(input_BC), expected.float(), **close)
    found, expected = gradient(block, input_BC), gradient(reference, input_BC.double())
    torch.testing.assert_close(found, expected.float(), **close)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_linear_in_bf16_is_near_fp64(name: str) -> None:
    torch.manual_seed(0)
    format = PlainRows(torch.bfloat16) if name == "bf16" else Int8Rows()
    block = gathered(block_of(format, torch.randn(50, 90), None))
    weight_RC, input_BC = exact_weight(block, format), torch.randn(20, 90).bfloat16()
    output_BR = block(input_BC)
    assert output_BR.dtype == torch.bfloat16
    expected_BR = input_BC.double() @ weight_RC.T
    assert (output_BR - expected_BR).norm() < 5e-3 * expected_BR.norm()
    found = gradient(block, input_BC)
    expected = gradient(lambda value: value @ weight_RC.T, input_BC.double())
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_that_is_gathered_keeps_nothing(name: str, with_bias: bool) -> None:
    bias_R = torch.randn(5) if with_bias else None
    block = gathered(block_of(FORMATS[name], torch.randn(5, 9), bias_R))
    input_BC = torch.randn(3, 9, requires_grad=True)
    assert kept(lambda: block(input_BC)) == []


def test_a_linear_that_is_whole_keeps_no_more_than_its_weight() -> None:
    block = block_of(FORMATS["fp32"], torch.randn(5, 9), torch.randn(5))
    input_BC = torch.randn(3, 9, requires_grad=True)
    assert block.flat is not None
    storages = {t.untyped_storage().data_ptr() for t in kept(lambda: block(input_BC))}
    assert storages <= {block.flat.untyped_storage().data_ptr()}


def test_a_large_head_rounds_alike_whole_and_gathered() -> None:
    """Of the last positions of a row, as a decoder-only model's head gets them: not contiguous."""
    generator = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(49152, 64, generator=generator)
    hidden_BSD = torch.randn(4, 60, 64, generator=generator)

    def gradient_of_targets(block: FrozenBlock) -> Tensor:
        return gradient(lambda hidden: block(hidden[:, -3:])[:, :-1].softmax(-1), hidden_BSD)

    whole = gradient_of_targets(block_of(FORMATS["fp32"], weight_RC, None))
    again = gradient_of_targets(gathered(block_of(FORMATS["fp32"], weight_RC, None)))
    assert whole.abs().max() > 0
    assert torch.equal(whole, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_rounds_alike_whole_and_gathered(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_RC, bias_R, input_BC = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((64, 32), (64,), (50, 32))
    )
    whole = block_of(PlainRows(dtype), weight_RC, bias_R)
    expected_BR = whole(input_BC)
    assert torch.equal(gathered(whole)(input_BC), expected_BR)


def test_a_linear_looks_for_its_weight_when_the_gradient_comes() -> None:
    """Under ZeRO-3 the bytes of the forward pass are gone by then; new ones have been gathered."""
    block = gathered(block_of(FORMATS["int8"], torch.randn(5, 9), None))
    assert block.flat is not None
    bytes_before = block.flat.detach().clone()
    input_BC = torch.randn(3, 9, requires_grad=True)
    output = block(input_BC)
    block.flat.data = torch.empty(0, dtype=torch.uint8)
    block.flat.data = bytes_before
    output.sum().backward()
    expected = exact_weight(block, FORMATS["int8"]).sum(0)
    torch.testing.assert_close(input_BC.grad, expected.float().expand(3, 9))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0, 1e4])
def test_the_norm_is_that_of_fp64(scale: float) -> None:
    torch.manual_seed(0)
    weight_D, hidden_BD = torch.randn(24), torch.randn(3, 2, 24) * scale
    norm = FrozenRMSNorm(weight_D, 1e-6)

    def reference(value: Tensor) -> Tensor:
        rms = (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return value / rms * weight_D.double()

    expected = reference(hidden_BD.double()).float()
    torch.testing.assert_close(norm(hidden_BD), expected, rtol=1e-5, atol=1e-5)
    expected = gradient(reference, hidden_BD.double()).float()
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(gradient(norm, hidden_BD), expected, rtol=0, atol=tolerance)


def test_the_norm_in_bf16_is_near_fp64_and_keeps_its_input_alone() -> None:
    torch.manual_seed(0)
    weight_D, hidden_BD = torch.randn(256).bfloat16(), torch.randn(8, 256).bfloat16()
    norm = FrozenRMSNorm(weight_D, 1e-6)

    def reference(value: Tensor) -> Tensor:
        rms = (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return value / rms * weight_D.double()

    found, expected = gradient(norm, hidden_BD), gradient(reference, hidden_BD.double())
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 1e-2 * expected.norm()
    input_BD = hidden_BD.clone().requires_grad_(True)
    pointers = [t.data_ptr() for t in kept(lambda: norm(input_BD))]
    assert sorted(pointers) == sorted([input_BD.data_ptr(), weight_D.data_ptr()])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    assert knows_activation(name)
    values = torch.linspace(-6, 6, 241).double()
    reference = ACT2FN[name]
    torch.testing.assert_close(activate(name, values), reference(values))
    found = gradient(lambda value: activate(name, value), values)
    torch.testing.assert_close(found, gradient(reference, values))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    gate, linear = 3 * torch.randn(4, 30).double(), torch.randn(4, 30).double()
    torch.testing.assert_close(activate_gated(name, gate, linear), ACT2FN[name](gate) * linear)
    for_gate = gradient(lambda value: activate_gated(name, value, linear), gate)
    expected = gradient(lambda value: ACT2FN[name](value) * linear, gate)
    torch.testing.assert_close(for_gate, expected)
    for_linear = gradient(lambda value: activate_gated(name, gate, value), linear)
    expected = gradient(lambda value: ACT2FN[name](gate) * value, linear)
    torch.testing.assert_close(for_linear, expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_activation_keeps_its_two_inputs_alone(name: str) -> None:
    gate, linear = (torch.randn(4, 30, requires_grad=True) for _ in range(2))
    pointers = {t.data_ptr() for t in kept(lambda: activate_gated(name, gate, linear))}
    assert pointers == {gate.data_ptr(), linear.data_ptr()}


def test_an_unknown_activation_is_unknown() -> None:
    assert not knows_activation("quick_gelu")


def test_checkpointing_keeps_the_input_alone_and_gives_the_same_gradient() -> None:
    norm = FrozenRMSNorm(torch.randn(24), 1e-6)
    block = FrozenBlock(nn.Sequential(norm, nn.GELU(), norm))
    input_BD = torch.randn(3, 24)
    expected = gradient(block, input_BD)
    block.checkpoint_activations = True
    torch.testing.assert_close(gradient(block, input_BD), expected, rtol=0, atol=0)
    leaf_BD = input_BD.clone().requires_grad_(True)
    sizes = [t.numel() for t in kept(lambda: block(leaf_BD * 1))]
    assert sum(sizes) <= input_BD.numel()
