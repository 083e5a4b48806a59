"""Bytes that a forward pass leaves for the backward pass, and that the backward pass works with.

Axes: B rows of a micro-batch, S positions (prompt and input; in a decoder-only model the target,
too), T target tokens, D model width.

What is kept per position and encoder layer: the inputs of both norms, queries, keys, values and the
attention's output, and both halves of the gated feed-forward part. For T5-XXL that is 11 times D,
where Hugging Face's blocks keep 34.6 and DeepSpeed's linear brings them to 39.1.
"""

from __future__ import annotations

import re

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Workload

_FP32 = 4
_MASK_ALIGNMENT = 8
"""Positions; a mask whose rows do not start at such a multiple is copied by every layer."""


def kept_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """What autograd holds at the end of a forward pass, with the masks and without weights."""
    return _encoder_bytes(architecture, cell, workload) + _decoder_bytes(
        architecture, cell, workload
    )


def activation_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """The most that is alive between the end of the forward pass and the last block's backward."""
    positions = workload.micro_batch * workload.num_positions(architecture)
    encoder = _encoder_bytes(architecture, cell, workload)
    scratch = positions * _backward_scratch(architecture, cell)
    if split_layers(architecture.num_layers, cell.activation_checkpointing)[1]:
        scratch += _layer_bytes(architecture, cell, workload)
    decoder = _decoder_bytes(architecture, cell, workload)
    if architecture.num_decoder_layers:
        # Gradients of the encoder's output, and of the keys and values of the layer at work.
        crossed = _crossed_bytes(architecture, cell, workload)
        decoder += positions * architecture.d_model * cell.item_bytes + crossed
        if split_layers(architecture.num_decoder_layers, cell.activation_checkpointing)[1]:
            decoder += crossed + _decoder_layer_bytes(architecture, cell, workload)
    return encoder + max(scratch, decoder)


def split_layers(num_layers: int, checkpointing: str) -> tuple[int, int]:
    """How many layers keep everything, and how many only their input."""
    if checkpointing == "none":
        return num_layers, 0
    every = re.fullmatch(r"every_([1-9]\d*)", checkpointing)
    checkpointed = -(-num_layers // int(every[1])) if every else num_layers
    return num_layers - checkpointed, checkpointed


def _encoder_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """Kept by the encoder, or by a decoder-only model."""
    positions = workload.micro_batch * workload.num_positions(architecture)
    num_whole, num_checkpointed = split_layers(
        architecture.num_layers, cell.activation_checkpointing
    )
    stream = positions * architecture.d_model * cell.item_bytes
    layers = num_whole * _layer_bytes(architecture, cell, workload) + num_checkpointed * stream
    bias = architecture.num_heads * _square_bytes(architecture, cell, workload)
    # T5's position bias and mask are made once for the stack.
    return layers + stream + (bias if architecture.family == "seq2seq" else 0)


def _layer_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """Kept by one layer of the encoder, or of a decoder-only model."""
    positions = workload.micro_batch * workload.num_positions(architecture)
    layer = positions * _kept_by_layer(architecture, cell)
    if architecture.family == "causal":
        layer += _square_bytes(architecture, cell, workload)  # made from booleans by every layer
    return layer


def _decoder_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """Kept by the decoder behind an encoder."""
    num_whole, num_checkpointed = split_layers(
        architecture.num_decoder_layers, cell.activation_checkpointing
    )
    targets = workload.micro_batch * workload.target_length
    layer = _decoder_layer_bytes(architecture, cell, workload)
    layer += _crossed_bytes(architecture, cell, workload)
    return num_whole * layer + num_checkpointed * targets * architecture.d_model * cell.item_bytes


def _decoder_layer_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """Kept by one decoder layer for its own T positions."""
    cross_attention = 2 * architecture.attention_width + architecture.d_model
    position = _kept_by_layer(architecture, cell) + cross_attention * cell.item_bytes
    return workload.micro_batch * workload.target_length * position


def _crossed_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """Keys and values that one decoder layer makes of the encoder's output."""
    positions = workload.micro_batch * workload.num_positions(architecture)
    return positions * 2 * architecture.key_value_width * cell.item_bytes


def _kept_by_layer(architecture: Architecture, cell: Cell) -> int:
    """Bytes per position of an encoder layer, or of a layer of a decoder-only model."""
    # Keys and values are repeated for every head that shares them before the attention sees them.
    attention = 4 * architecture.attention_width
    hidden = (2 if architecture.gated else 1) * architecture.d_ff
    kept = (2 * architecture.d_model + attention + hidden) * cell.item_bytes
    return kept + (architecture.num_heads + 2) * _FP32  # softmax's and both norms' normalisers


def _backward_scratch(architecture: Architecture, cell: Cell) -> int:
    """Bytes per position while the feed-forward part is differentiated."""
    # The product's gradient, the activation again, and the gradients of both halves.
    hidden = (4 if architecture.gated else 2) * architecture.d_ff
    return (2 * architecture.d_model + hidden) * cell.item_bytes


def _square_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """A mask or bias of S x S numbers for every row."""
    positions = workload.num_positions(architecture)
    columns = -(-positions // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    return workload.micro_batch * positions * columns * cell.item_bytes
