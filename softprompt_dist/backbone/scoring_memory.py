"""How many positions a device can score at a time: no gradients, but keys and values to keep.

Pure arithmetic, so that one kind of device always gets one answer, and a run the same batches.
"""

from __future__ import annotations

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.memory_model import predict_memory

MOST_POSITIONS = 65_536
"""More make nothing faster: the products are large by then."""
_STEP = 1024
_USABLE = 0.8
"""Share of what is free that is counted on: batches of many shapes leave gaps between tensors."""
_FP32 = 4


def scoring_positions(
    architecture: Architecture,
    cell: Cell,
    workload: Workload,
    cluster: Cluster,
    device_bytes: float,
) -> int:
    """Positions (prompt, input and answers of all rows) that fit beside the backbone.

    Args:
        architecture: of the backbone.
        cell: how it is held.
        workload: with the prompt and the longest input.
        cluster: the devices.
        device_bytes: memory of one of them.

    Returns:
        A multiple of 1,024, at least that and at most `MOST_POSITIONS`.
    """
    memory = predict_memory(architecture, cell, workload, cluster)
    resident = memory.weights + memory.buffers + memory.context
    # After training, ZeRO-3 keeps the last block and the head through a pass without a backward.
    blocks = memory.cached + 2 * memory.gathered
    free = _USABLE * (device_bytes - resident - blocks)
    positions = int(free / position_bytes(architecture, cell, workload))
    return max(_STEP, min(MOST_POSITIONS, positions) // _STEP * _STEP)


def position_bytes(architecture: Architecture, cell: Cell, workload: Workload) -> int:
    """The most that a position takes while it is scored, be it of an input or of an answer."""
    item = cell.item_bytes
    stream, width = architecture.d_model * item, architecture.attention_width * item
    hidden = (3 if architecture.gated else 2) * architecture.d_ff * item
    at_work = 5 * stream + max(5 * width, hidden)
    length = workload.num_positions(architecture)
    key_value = 2 * architecture.key_value_width * item
    if architecture.family == "seq2seq":
        # The bias with the mask, and the same in aligned rows; then every decoder layer's keys.
        kept = 2 * architecture.num_heads * length * item
        kept += stream + architecture.num_decoder_layers * key_value
    else:
        kept = 2 * length * item + (architecture.num_layers + 1) * key_value
    logits = architecture.vocabulary_size * (item + 2 * _FP32)
    return at_work + max(kept, logits)
