"""Bytes that a backbone takes on each device, predicted before anything is loaded.

Axes: B rows of a micro-batch, S positions (prompt and input; in a decoder-only model the target,
too), T target tokens, D model width. Pure arithmetic: no torch, no device.

What is kept for the backward pass, per position and encoder layer, is counted in `_kept_by_layer`:
the inputs of both norms, queries, keys, values and the attention's output, and both halves of the
gated feed-forward part. For T5-XXL that is 11 times D, where Hugging Face's blocks keep 34.6 and
DeepSpeed's linear brings them to 39.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

from softprompt_dist.backbone.architecture import Architecture, Matrix
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import MachineError

ITEM_BYTES = {"fp32": 4, "bf16": 2}
_FP32 = 4
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""bitsandbytes with double quantization: an 8-bit scale for 64 weights, an fp32 for 256 scales."""
_MASK_ALIGNMENT = 8
"""Positions; a mask whose rows do not start at such a multiple is copied by every layer."""
_CONTEXT_BYTES = 600_000_000
"""CUDA context and kernels, outside of what torch allocates."""
_COMMUNICATOR_BYTES = 300_000_000
"""NCCL's buffers, where there is more than one device."""
_FRAGMENTATION = 0.05
"""Share of what comes and goes that lies unusable between other tensors."""


@dataclass(frozen=True)
class Cell:
    """How a backbone is held; names and values are those of the recipe's `backbone` section."""

    sharding: Literal["replicated", "zero3"] = "replicated"
    dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["none", "int8", "llm_int8", "nf4"] = "none"
    quantized_layers: Literal["blocks", "blocks_without_wo"] = "blocks"
    activation_checkpointing: str = "none"
    offload: Literal["none", "cpu", "nvme"] = "none"
    shard_group: Literal["world", "node"] = "world"

    @classmethod
    def of(cls, config: BackboneConfig) -> Cell:
        """The cell that a recipe's section asks for."""
        values = config.model_dump()
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    @property
    def item_bytes(self) -> int:
        """Of one number of the activations."""
        return ITEM_BYTES[self.dtype]

    def matrix_bytes(self, matrix: Matrix) -> int:
        """A stored weight, with its scales where it is quantized."""
        if not self.quantizes(matrix):
            return matrix.size * self.item_bytes
        if self.quantization == "nf4":
            return round(matrix.size * _NF4_BYTES)
        return matrix.size + matrix.num_rows * _FP32

    def quantizes(self, matrix: Matrix) -> bool:
        """Whether the weight is stored in fewer bits than it is computed with."""
        spared = {"head"}
        if self.quantized_layers == "blocks_without_wo":
            spared.add("feed_forward_out")
        return self.quantization != "none" and matrix.role not in spared

    def block_bytes(self, block: Sequence[Matrix]) -> int:
        """A block as it is stored and, under ZeRO-3, gathered."""
        return sum(map(self.matrix_bytes, block))


@dataclass(frozen=True)
class Workload:
    """The tensors of one forward and backward pass."""

    micro_batch: int = 4
    prompt_length: int = 100
    input_length: int = 512
    target_length: int = 8

    def num_positions(self, architecture: Architecture) -> int:
        """S: prompt and input; the target stands behind them in a decoder-only model."""
        target = 0 if architecture.num_decoder_layers else self.target_length
        return self.prompt_length + self.input_length + target


@dataclass(frozen=True)
class Cluster:
    """How many devices there are, and on how many machines."""

    gpus_per_node: int = 1
    nodes: int = 1
    gathers_into_copy: bool = False
    """gloo, on CPUs, receives a block in memory of its own and copies it; NCCL does not."""

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.gpus_per_node * self.nodes

    def num_shards(self, cell: Cell) -> int:
        """Parts a sharded weight is cut into; 1 for a replicated one."""
        if cell.sharding == "replicated":
            return 1
        return self.gpus_per_node if cell.shard_group == "node" else self.num_gpus


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: int
    gathered: int
    """Blocks whole during their use, and a de-quantized matrix."""
    activations: int
    """Kept for the backward pass, with the masks, and what the backward pass works with."""
    logits: int
    buffers: int
    """The prompt, its gradient and its optimizer's state; norms, biases, relative positions."""
    reserve: int
    """The device's context, communication buffers and fragmentation; not torch's to count."""

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` shows."""
        return self.total - self.reserve

    @property
    def total(self) -> int:
        """What the device must have."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict_memory(
    architecture: Architecture, cell: Cell, workload: Workload, cluster: Cluster
) -> Memory:
    """Peak memory of one device, in bytes."""
    activations = activation_bytes(architecture, cell, workload)
    gathered = gathered_bytes(architecture, cell, cluster)
    logits = _logit_bytes(architecture, cell, workload)
    moving = activations + gathered + logits
    communicator = _COMMUNICATOR_BYTES if cluster.num_gpus > 1 else 0
    return Memory(
        weights=weight_bytes(architecture, cell, cluster),
        gathered=gathered,
        activations=activations,
        logits=logits,
        buffers=_buffer_bytes(architecture, cell, workload),
        reserve=_CONTEXT_BYTES + communicator + round(_FRAGMENTATION * moving),
    )


def check_memory(
    architecture: Architecture,
    cell: Cell,
    workload: Workload,
    cluster: Cluster,
    device_bytes: int,
) -> None:
    """Refuse a device that is too small, before hours of loading.

    Raises:
        MachineError: the prediction exceeds `device_bytes`.
    """
    memory = predict_memory(architecture, cell, workload, cluster)
    if memory.total <= device_bytes:
        return
    parts = ", ".join(f"{f.name} {getattr(memory, f.name) / 1e9:.1f}" for f in fields(memory))
    raise MachineError(
        f"{architecture.name} ({cell.sharding}, {cell.dtype}, quantization {cell.quantization}, "
        f"micro-batch {workload.micro_batch}) needs {memory.total / 1e9:.1f} GB on each device "
        f"({parts}), which has {device_bytes / 1e9:.1f} GB. `softprompt plan --model "
        f"{architecture.name} --gpus {cluster.gpus_per_node} --gpu-memory "
        f"{device_bytes / 1e9:.0f}` shows what fits."
    )


def sharded_bytes(architecture: Architecture, cell: Cell) -> int:
    """All blocks and the head, as they are stored: what ZeRO-3 cuts and gathers."""
    return sum(map(cell.block_bytes, architecture.blocks()))


def weight_bytes(architecture: Architecture, cell: Cell, cluster: Cluster) -> int:
    """On the device for the whole run."""
    blocks = sharded_bytes(architecture, cell)
    if cell.sharding == "zero3":
        # The input embedding stays in the memory-mapped checkpoint.
        return 0 if cell.offload != "none" else -(-blocks // cluster.num_shards(cell))
    # A tied head is a block of its own beside the table.
    return blocks + architecture.embedding_size * cell.item_bytes


def gathered_bytes(architecture: Architecture, cell: Cell, cluster: Cluster) -> int:
    """The block in use with the one that is fetched meanwhile, and one de-quantized matrix."""
    blocks = list(architecture.blocks())
    sizes = list(map(cell.block_bytes, blocks))
    working_set = 0
    if cell.sharding == "zero3":
        copies = 2 if cluster.gathers_into_copy and cluster.num_shards(cell) > 1 else 1
        working_set = max(first + copies * second for first, second in pairwise(sizes))
        if cell.offload != "none":
            working_set += working_set // cluster.num_shards(cell)
    quantized = [m.size for block in blocks for m in block if cell.quantizes(m)]
    return working_set + max(quantized, default=0) * cell.item_bytes


def activation_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """The most that is alive between the end of the forward pass and the last block's backward."""
    rows = workload.micro_batch
    positions = rows * workload.num_positions(architecture)
    num_whole, num_checkpointed = split_layers(
        architecture.num_layers, cell.activation_checkpointing
    )
    stream = positions * architecture.d_model * cell.item_bytes
    layer = positions * _kept_by_layer(architecture, cell)
    kept = num_whole * layer + num_checkpointed * stream + stream
    in_encoder = positions * _backward_scratch(architecture, cell)
    if num_checkpointed:
        in_encoder += layer
    in_decoder = _decoder_bytes(architecture, cell, workload)
    return kept + max(in_encoder, in_decoder) + _mask_bytes(architecture, cell, workload)


def _kept_by_layer(architecture: Architecture, cell: Cell) -> int:
    """Bytes per position of an encoder layer, or of a layer of a decoder-only model."""
    # Keys and values are repeated for every head that shares them before the attention sees them.
    attention = 4 * architecture.attention_width
    halves = 2 if architecture.gated else 1
    if architecture.family == "causal":
        halves += 1  # transformers' own block keeps the activation, too
    hidden = halves * architecture.d_ff
    kept = (2 * architecture.d_model + attention + hidden) * cell.item_bytes
    return kept + (architecture.num_heads + 2) * _FP32  # softmax's and both norms' normalisers


def _backward_scratch(architecture: Architecture, cell: Cell) -> int:
    """Bytes per position while the feed-forward part is differentiated."""
    # The product's gradient, the activation again, and the gradients of both halves.
    hidden = (4 if architecture.gated else 2) * architecture.d_ff
    return (2 * architecture.d_model + hidden) * cell.item_bytes


def _decoder_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """What the decoder behind an encoder keeps; its keys and values of the encoder's output."""
    num_whole, num_checkpointed = split_layers(
        architecture.num_decoder_layers, cell.activation_checkpointing
    )
    targets = workload.micro_batch * workload.target_length
    positions = workload.micro_batch * workload.num_positions(architecture)
    stream = targets * architecture.d_model * cell.item_bytes
    crossed = positions * 2 * architecture.key_value_width * cell.item_bytes
    attention = 2 * architecture.attention_width + architecture.d_model
    own = targets * (_kept_by_layer(architecture, cell) + attention * cell.item_bytes)
    total = num_whole * (own + crossed) + num_checkpointed * stream
    if num_checkpointed:
        total += own + crossed
    if num_whole + num_checkpointed:
        # Gradients of the encoder's output, and of the keys and values of the layer at work.
        total += positions * architecture.d_model * cell.item_bytes + crossed
    return total


def _mask_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    positions = workload.num_positions(architecture)
    columns = -(-positions // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    square = workload.micro_batch * positions * columns * cell.item_bytes
    if architecture.num_decoder_layers:
        return architecture.num_heads * square  # position bias and mask, once for the stack
    return architecture.num_layers * square  # made from booleans by every layer's attention


def _logit_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    count = workload.micro_batch * (workload.target_length + 1) * architecture.vocabulary_size
    # Logits, then in fp32 the logits, their exponentials and their gradient.
    return count * (cell.item_bytes + 3 * _FP32)


def _buffer_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    prompt = workload.prompt_length * architecture.d_model * _FP32
    return 4 * prompt + architecture.small_size * cell.item_bytes


def split_layers(num_layers: int, checkpointing: str) -> tuple[int, int]:
    """How many layers keep everything, and how many only their input."""
    if checkpointing == "none":
        return num_layers, 0
    every = re.fullmatch(r"every_([1-9]\d*)", checkpointing)
    checkpointed = -(-num_layers // int(every[1])) if every else num_layers
    return num_layers - checkpointed, checkpointed
