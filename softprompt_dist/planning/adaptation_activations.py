"""Bytes that training all weights keeps for the backward pass, and works with in it.

Axes: B rows of a micro-batch, S encoder positions (in a decoder-only model: all), T decoder
positions, D model width. Beside what a frozen layer keeps (`backbone/activations.py`) these are the
inputs of all matrices, for the gradients of weights. As on a GPU: fused norms and attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from softprompt_dist.backbone.activations import dropped_numbers
from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Workload

_FP32 = 4


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number where products are made, and in what runs between the layers."""

    product: int
    stream: int
    """Of residuals, norms and position biases: that of the weights."""

    @property
    def casts(self) -> bool:
        """Whether every product makes copies of its inputs (autocast)."""
        return self.product != self.stream


BF16 = Numbers(product=2, stream=2)
AUTOCAST = Numbers(product=2, stream=4)
FP32 = Numbers(product=4, stream=4)


def activation_bytes(
    architecture: Architecture, work: Workload, numbers: Numbers, *, checkpointing: bool
) -> int:
    """The most that is alive between the end of the forward and the end of the backward pass."""
    layer = _layer_bytes(architecture, work, numbers)
    crossed_layer = _decoder_layer_bytes(architecture, work, numbers)
    positions, targets = _positions(architecture, work)
    scratch = max(positions, targets) * _backward_scratch(architecture, numbers)
    scratch += positions * architecture.d_model * numbers.stream
    scratch += 2 * max(_bias_bytes(architecture, work, numbers))
    if checkpointing:
        scratch += max(layer, crossed_layer)
    return kept_bytes(architecture, work, numbers, checkpointing=checkpointing) + scratch


def kept_bytes(
    architecture: Architecture, work: Workload, numbers: Numbers, *, checkpointing: bool
) -> int:
    """What autograd holds at the end of a forward pass, without weights and logits."""
    positions, targets = _positions(architecture, work)
    stream = architecture.d_model * numbers.stream
    layer = _layer_bytes(architecture, work, numbers)
    crossed_layer = _decoder_layer_bytes(architecture, work, numbers)
    if checkpointing:
        layer, crossed_layer = positions * stream, targets * stream
    final_norm = _norm_bytes(architecture, numbers) + architecture.d_model * numbers.product
    ends = (positions + targets) * final_norm
    return (
        architecture.num_layers * layer
        + architecture.num_decoder_layers * crossed_layer
        + sum(_bias_bytes(architecture, work, numbers))
        + ends
    )


def _positions(architecture: Architecture, work: Workload) -> tuple[int, int]:
    """Of all rows: those of the encoder or decoder-only model, and those of a decoder behind it."""
    targets = work.target_length if architecture.num_decoder_layers else 0
    return work.micro_batch * work.num_positions(architecture), work.micro_batch * targets


def _layer_bytes(architecture: Architecture, work: Workload, numbers: Numbers) -> int:
    """Kept by a layer of the encoder, or of a decoder-only model."""
    positions, _ = _positions(architecture, work)
    kept = positions * (
        _kept_by_position(architecture, numbers) + _dropout_masks(architecture, work)
    )
    if numbers.casts and architecture.family == "seq2seq":
        kept += _squares(architecture, work)[0] * numbers.product
    return kept


def _decoder_layer_bytes(architecture: Architecture, work: Workload, numbers: Numbers) -> int:
    """Kept by a layer of the decoder behind an encoder, with keys and values of its output."""
    if not architecture.num_decoder_layers:
        return 0
    positions, targets = _positions(architecture, work)
    width = architecture.attention_width
    cross = architecture.d_model * (numbers.stream + numbers.product)
    cross += 2 * width * numbers.product + (architecture.num_heads + 1) * _FP32
    crossed = 2 * architecture.key_value_width * numbers.product
    mask = work.micro_batch * work.num_positions(architecture) * work.target_length
    kept = mask * numbers.product
    if numbers.casts:
        crossed += 2 * architecture.d_model * numbers.product
        kept += _squares(architecture, work)[1] * numbers.product
    cross += _dropout_masks(architecture, work, crossing=True)
    kept += targets * (_kept_by_position(architecture, numbers) + cross)
    return kept + positions * crossed


def _kept_by_position(architecture: Architecture, numbers: Numbers) -> int:
    """By self-attention and feed-forward part of a layer, without scores."""
    inputs = 2 if architecture.gated else 1
    hidden = (inputs + 1) * architecture.d_ff
    if architecture.family == "causal":  # transformers' own activation is not fused
        hidden += architecture.d_ff
    # Queries, keys and values have one input, which autocast casts for each of them.
    copies = 3 + inputs if numbers.casts else 2
    attention = 2 * (architecture.attention_width + architecture.key_value_width)
    products = copies * architecture.d_model + attention + hidden
    kept = 2 * _norm_bytes(architecture, numbers) + products * numbers.product
    return kept + (architecture.num_heads + 2) * _FP32


def _dropout_masks(architecture: Architecture, work: Workload, *, crossing: bool = False) -> int:
    """Bytes per position and layer, of a boolean for each number."""
    return dropped_numbers(architecture, crossing=crossing) if work.dropout else 0


def _norm_bytes(architecture: Architecture, numbers: Numbers) -> int:
    """Kept per position by a norm; transformers' own, of decoder-only models, is not fused."""
    unfused = _FP32 if architecture.family == "causal" else 0
    return architecture.d_model * (numbers.stream + unfused)


def _backward_scratch(architecture: Architecture, numbers: Numbers) -> int:
    """Bytes per position while the feed-forward part is differentiated."""
    # The product's gradient, the activation again, and the gradients of both halves.
    hidden = (4 if architecture.gated else 2) * architecture.d_ff
    return (2 * architecture.d_model + hidden) * numbers.product


def _bias_bytes(architecture: Architecture, work: Workload, numbers: Numbers) -> tuple[int, int]:
    """T5's position biases with the masks of packed rows, made once for each stack."""
    if architecture.family != "seq2seq":
        return 0, 0
    encoder, decoder = _squares(architecture, work)
    return encoder * numbers.stream, decoder * numbers.stream


def _squares(architecture: Architecture, work: Workload) -> tuple[int, int]:
    """Numbers in the biases of encoder and decoder, for every row and head."""
    heads = work.micro_batch * architecture.num_heads
    return heads * work.num_positions(architecture) ** 2, heads * work.target_length**2
