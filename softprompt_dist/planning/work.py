"""What one step computes and moves: operations, and bytes received by a device.

Axes: B rows of a micro-batch on one device, S positions, T target tokens. A step is one forward and
one backward pass with one micro-batch on every device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from softprompt_dist.backbone.activations import split_layers
from softprompt_dist.backbone.architecture import Architecture, Matrix
from softprompt_dist.backbone.cell import Cell, Cluster, Workload

_FP32 = 4


@dataclass(frozen=True)
class Part:
    """Equal layers through which the same number of tokens goes."""

    num_layers: int
    num_tokens: int
    matrices: tuple[Matrix, ...]
    attention_operations: float = 0.0
    """Of the two products with activations on both sides, all layers, forward."""
    is_recomputed: bool = True
    """Whether activation checkpointing computes it twice."""

    @property
    def matrix_operations(self) -> float:
        """Of the products with weights, all layers, forward."""
        size = sum(matrix.size for matrix in self.matrices)
        return 2.0 * self.num_tokens * self.num_layers * size


def parts(architecture: Architecture, workload: Workload) -> list[Part]:
    """The model as one micro-batch on one device goes through it."""
    rows, targets = workload.micro_batch, workload.target_length
    positions = workload.num_positions(architecture)
    width = architecture.attention_width
    layers, decoder_layers = architecture.num_layers, architecture.num_decoder_layers
    found = [
        Part(
            layers, rows * positions, architecture.layer, layers * 4.0 * rows * positions**2 * width
        )
    ]
    if decoder_layers:
        crossed = decoder_layers * 4.0 * rows * targets * (positions + targets) * width
        matrices = architecture.decoder_layer
        found += [
            Part(decoder_layers, rows * positions, _with_role(matrices, cross=True)),
            Part(decoder_layers, rows * targets, _with_role(matrices, cross=False), crossed),
        ]
    num_logits = rows * (targets if decoder_layers else targets + 1)
    found.append(Part(1, num_logits, (architecture.head,), is_recomputed=False))
    return found


def _with_role(matrices: Iterable[Matrix], *, cross: bool) -> tuple[Matrix, ...]:
    return tuple(matrix for matrix in matrices if (matrix.role == "cross") == cross)


def forward_operations(architecture: Architecture, workload: Workload) -> float:
    """Floating-point operations of a forward pass on one device."""
    return sum(p.matrix_operations + p.attention_operations for p in parts(architecture, workload))


def backward_operations(architecture: Architecture, workload: Workload) -> float:
    """Of a backward pass to the prompt alone; weights have no gradient, which is half the usual."""
    return sum(
        p.matrix_operations + 2 * p.attention_operations for p in parts(architecture, workload)
    )


def training_operations(
    architecture: Architecture, rows: int, input_length: int, target_length: int
) -> float:
    """Floating-point operations of training all weights on some rows, padding included.

    Three times the forward pass: the backward pass makes the gradients of inputs and of weights.
    What activation checkpointing computes again is not counted, as in model FLOP utilization (MFU).

    Args:
        architecture: of the model.
        rows: how many.
        input_length: encoder positions of a row; 0 for a decoder-only model trained on plain text.
        target_length: positions of a row that have logits.
    """
    *layers, head = parts(architecture, Workload(rows, 0, input_length, target_length))
    head = replace(head, num_tokens=rows * target_length)
    return 3 * sum(p.matrix_operations + p.attention_operations for p in (*layers, head))


def recomputed_share(architecture: Architecture, cell: Cell) -> float:
    """Share of the layers that activation checkpointing computes again."""
    _, checkpointed = split_layers(architecture.num_layers, cell.activation_checkpointing)
    return checkpointed / architecture.num_layers


def gather_bytes(architecture: Architecture, cell: Cell, cluster: Cluster) -> float:
    """Received by a device in a step to bring sharded blocks in.

    Each block once forward and once backward; the last layer and the head stay in between. A block
    that is computed again for its backward pass is gathered for both together.
    """
    if cell.sharding == "replicated":
        return 0.0
    sizes = [cell.block_bytes(block) for block in architecture.blocks()]
    num_shards = cluster.num_shards(cell)
    return (2 * sum(sizes) - sum(sizes[-2:])) * (num_shards - 1) / num_shards


def reduce_bytes(architecture: Architecture, workload: Workload, cluster: Cluster) -> float:
    """Received by a device in a step to sum the prompt's gradient over all (a ring)."""
    prompt = workload.prompt_length * architecture.d_model * _FP32
    return 2 * prompt * (cluster.num_gpus - 1) / cluster.num_gpus


def offload_bytes(architecture: Architecture, cell: Cell, cluster: Cluster) -> float:
    """Copied to a device in a step from the node's memory or disk: its own parts of the blocks."""
    if cell.offload == "none":
        return 0.0
    sizes = [cell.block_bytes(block) for block in architecture.blocks()]
    return (2 * sum(sizes) - sum(sizes[-2:])) / cluster.num_shards(cell)
