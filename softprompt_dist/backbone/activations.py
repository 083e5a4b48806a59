"""Bytes that a forward pass leaves for the backward pass, and that the backward pass works with.

Axes: B rows of a micro-batch, S positions (prompt and input; in a decoder-only model the target,
too), T target tokens, D model width.

What is kept per position and encoder layer: the inputs of both norms, queries, keys, values and the
attention's output, and both halves of the gated feed-forward part. For T5-XXL that is 11 times D,
where Hugging Face's blocks keep 34.6 and DeepSpeed's linear brings them to 39.1.

Dropout adds masks: a byte for a number on a GPU, where attention draws its own anew. On a CPU it
adds whole numbers, and attention with dropout keeps three S x S matrices for every head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Workload

_FP32 = 4
_BOOL = 1
_MASK_ALIGNMENT = 8
"""Positions; a mask whose rows do not start at such a multiple is copied by every layer."""


def kept_bytes(
    architecture: Architecture, cell: Cell, workload: Workload, *, on_cpu: bool = False
) -> int:
    """What autograd holds at the end of a forward pass, with the masks and without weights."""
    work = _Pass(architecture, cell, workload, on_cpu)
    return work.encoder_bytes() + work.decoder_bytes()


def activation_bytes(
    architecture: Architecture, cell: Cell, workload: Workload, *, on_cpu: bool = False
) -> int:
    """The most that is alive between the end of the forward pass and the last block's backward."""
    work = _Pass(architecture, cell, workload, on_cpu)
    scratch = work.backward_scratch()
    if split_layers(architecture.num_layers, cell.activation_checkpointing)[1]:
        scratch += work.layer_bytes()
    decoder = work.decoder_bytes()
    if architecture.num_decoder_layers:
        # Gradients of the encoder's output, and of the keys and values of the layer at work.
        crossed = work.crossed_bytes()
        decoder += work.positions * work.stream + crossed
        if split_layers(architecture.num_decoder_layers, cell.activation_checkpointing)[1]:
            decoder += crossed + work.decoder_layer_bytes()
    return work.encoder_bytes() + max(scratch, decoder)


def split_layers(num_layers: int, checkpointing: str) -> tuple[int, int]:
    """How many layers keep everything, and how many only their input."""
    if checkpointing == "none":
        return num_layers, 0
    every = re.fullmatch(r"every_([1-9]\d*)", checkpointing)
    checkpointed = -(-num_layers // int(every[1])) if every else num_layers
    return num_layers - checkpointed, checkpointed


def dropped_numbers(architecture: Architecture, *, crossing: bool = False) -> int:
    """How many numbers of a position go through dropout in a layer, outside of its attention.

    `crossing` is a decoder layer's, with attention to the encoder's output.
    """
    if architecture.family == "causal":
        return 0  # Llama and its kind have dropout in the attention alone
    return (3 if crossing else 2) * architecture.d_model + architecture.d_ff


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass; sizes are of bytes."""

    architecture: Architecture
    cell: Cell
    workload: Workload
    on_cpu: bool

    @property
    def length(self) -> int:
        """S."""
        return self.workload.num_positions(self.architecture)

    @property
    def positions(self) -> int:
        """Of all rows."""
        return self.workload.micro_batch * self.length

    @property
    def targets(self) -> int:
        """Of all rows, where a decoder reads them."""
        return self.workload.micro_batch * self.workload.target_length

    @property
    def stream(self) -> int:
        """The hidden state of a position."""
        return self.architecture.d_model * self.cell.item_bytes

    @property
    def dropout_item(self) -> int:
        """What dropout keeps of a number: CUDA whether it stays, a CPU what it is multiplied by."""
        if not self.workload.dropout:
            return 0
        return self.cell.item_bytes if self.on_cpu else _BOOL

    @property
    def keeps_scores(self) -> bool:
        """Whether attention leaves its scores: no fused kernel of a CPU has dropout."""
        return self.on_cpu and self.workload.dropout > 0

    def encoder_bytes(self) -> int:
        """Kept by the encoder, or by a decoder-only model."""
        num_whole, num_checkpointed = split_layers(
            self.architecture.num_layers, self.cell.activation_checkpointing
        )
        stream = self.positions * self.stream
        kept = num_whole * self.layer_bytes() + (num_checkpointed + 1) * stream
        if self.architecture.family == "seq2seq":
            # T5's position bias and mask are made once for the stack.
            kept += self.architecture.num_heads * self._mask_bytes() + self._ends(self.positions)
        return kept

    def layer_bytes(self) -> int:
        """Kept by one layer of the encoder, or of a decoder-only model."""
        layer = self.positions * self._kept_by_layer() + self._score_bytes(self.length, self.length)
        if self.architecture.family == "causal" and not self.keeps_scores:
            layer += self._mask_bytes()  # made from booleans by every layer
        return layer

    def decoder_bytes(self) -> int:
        """Kept by the decoder behind an encoder."""
        if not self.architecture.num_decoder_layers:
            return 0
        num_whole, num_checkpointed = split_layers(
            self.architecture.num_decoder_layers, self.cell.activation_checkpointing
        )
        layer = self.decoder_layer_bytes() + self.crossed_bytes()
        kept = num_whole * layer + num_checkpointed * self.targets * self.stream
        return kept + self._ends(self.targets)

    def decoder_layer_bytes(self) -> int:
        """Kept by one decoder layer for its own T positions."""
        architecture, length = self.architecture, self.workload.target_length
        width = architecture.attention_width
        # Queries and the attention's output; where scores are kept, not that output.
        cross = width * _FP32 if self.keeps_scores else 2 * width * self.cell.item_bytes
        cross += self.stream
        scores = self._score_bytes(length, length) + self._score_bytes(length, self.length)
        return self.targets * (self._kept_by_layer(crossing=True) + cross) + scores

    def crossed_bytes(self) -> int:
        """Keys and values that one decoder layer makes of the encoder's output."""
        item = _FP32 if self.keeps_scores else self.cell.item_bytes
        return self.positions * 2 * self.architecture.key_value_width * item

    def backward_scratch(self) -> int:
        """While a layer's feed-forward part, or an attention with scores, is differentiated."""
        architecture = self.architecture
        # The product's gradient, the activation again, and the gradients of both halves.
        hidden = (4 if architecture.gated else 2) * architecture.d_ff
        feed_forward = self.positions * (2 * self.stream + hidden * self.cell.item_bytes)
        # Gradients of the scores behind and before dropout.
        return max(feed_forward, 2 * self._score_bytes(self.length, self.length) // 3)

    def _kept_by_layer(self, *, crossing: bool = False) -> int:
        """Bytes per position of an encoder layer, or of a layer of a decoder-only model."""
        architecture, item = self.architecture, self.cell.item_bytes
        width = architecture.attention_width
        # Keys and values are repeated for every head that shares them before the attention sees
        # them. It keeps all three, and its output with softmax's normalisers, or its scores.
        attention = 3 * width * _FP32
        if not self.keeps_scores:
            attention = 4 * width * item + architecture.num_heads * _FP32
        hidden = (2 if architecture.gated else 1) * architecture.d_ff * item
        dropped = dropped_numbers(architecture, crossing=crossing) * self.dropout_item
        return 2 * self.stream + attention + hidden + dropped + 2 * _FP32  # both norms' normalisers

    def _score_bytes(self, queries: int, keys: int) -> int:
        """Softmax's result, what dropout multiplies it by, and the product, for every head."""
        if not self.keeps_scores:
            return 0
        rows = self.workload.micro_batch * self.architecture.num_heads
        return 3 * rows * queries * keys * _FP32

    def _ends(self, positions: int) -> int:
        """Dropout before the first layer of a stack of T5 and behind the last."""
        return 2 * positions * self.architecture.d_model * self.dropout_item

    def _mask_bytes(self) -> int:
        """A mask or bias of S x S numbers for every row."""
        columns = -(-self.length // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
        return self.positions * columns * self.cell.item_bytes
