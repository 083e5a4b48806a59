"""Bytes that a backbone takes on each device, predicted before anything is loaded.

Pure arithmetic: no torch, no device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise

from softprompt_dist.backbone.activations import activation_bytes
from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.errors import MachineError

_FP32 = 4
_CONTEXT_BYTES = 600_000_000
"""CUDA context and kernels, outside of what torch allocates."""
_COMMUNICATOR_BYTES = 300_000_000
"""NCCL's buffers, where there is more than one device."""
_FRAGMENTATION = 0.05
"""Share of what comes and goes that lies unusable between other tensors."""
_BLOCKS_AT_A_TIME = 3
"""The one in use, the next one, and the one before, whose computation may not have ended."""


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
    cached: int
    """Reserved and not allocated: freed blocks that wait to be used again, and fragmentation."""
    context: int
    """The device's context and NCCL's buffers; not torch's to count."""

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` shows."""
        return self.reserved - self.cached

    @property
    def reserved(self) -> int:
        """What `torch.cuda.max_memory_reserved` shows."""
        return self.total - self.context

    @property
    def total(self) -> int:
        """What the device must have."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict_memory(
    architecture: Architecture, cell: Cell, workload: Workload, cluster: Cluster
) -> Memory:
    """Peak memory of one device, in bytes."""
    activations = activation_bytes(architecture, cell, workload, on_cpu=cluster.on_cpu)
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
        cached=_cached_bytes(architecture, cell) + round(_FRAGMENTATION * moving),
        context=_CONTEXT_BYTES + communicator,
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
        copies = 2 if cluster.on_cpu and cluster.num_shards(cell) > 1 else 1
        working_set = max(first + copies * second for first, second in pairwise(sizes))
        if cell.offload != "none":
            working_set += working_set // cluster.num_shards(cell)
    quantized = [m.size for block in blocks for m in block if cell.quantizes(m)]
    return working_set + max(quantized, default=0) * cell.item_bytes


def _cached_bytes(architecture: Architecture, cell: Cell) -> int:
    """Room that torch has made for gathered blocks, beyond the two that are whole at a time.

    A third one has been freed and is still computed with (`gather_limit.py`). Their room serves
    smaller blocks, too; for larger ones new room is made, and the old one kept.
    """
    if cell.sharding == "replicated":
        return 0
    sizes = [cell.block_bytes(block) for block in architecture.blocks()]
    room = largest = 0
    for size, count in Counter(sizes).items():  # in the order of their first use
        if size > largest:
            room, largest = room + min(count, _BLOCKS_AT_A_TIME) * size, size
    return max(0, room - max(map(sum, pairwise(sizes))))


def _logit_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    count = workload.micro_batch * (workload.target_length + 1) * architecture.vocabulary_size
    # Logits, then in fp32 the logits, their exponentials and their gradient.
    return count * (cell.item_bytes + 3 * _FP32)


def _buffer_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    prompt = workload.prompt_length * architecture.d_model * _FP32
    return 4 * prompt + architecture.small_size * cell.item_bytes
