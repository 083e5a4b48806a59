"""Memory of the nodes themselves: the processes, and weights that are off-loaded."""

from __future__ import annotations

from dataclasses import replace

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.memory_model import predict_memory, sharded_bytes

PROCESS_BYTES = 1_800_000_000
"""One rank without weights: Python, torch, and the rows that it is reading."""
_CPU_PROCESS_BYTES = 600_000_000
"""The same where there is no GPU to drive."""
NVME_BUFFERS = 5
"""Page-locked buffers between NVMe and device, each for one part of a block."""


def host_bytes(
    architecture: Architecture, cell: Cell, cluster: Cluster, process_bytes: int = PROCESS_BYTES
) -> int:
    """Host memory of one node that cannot be given back while the run lasts."""
    ranks = cluster.gpus_per_node
    total = ranks * process_bytes
    if cell.sharding == "zero3":
        total += architecture.embedding_size * architecture.checkpoint_bytes_per_weight
    if cell.offload == "cpu":
        total += ranks * -(-sharded_bytes(architecture, cell) // cluster.num_shards(cell))
    if cell.offload == "nvme":
        total += ranks * NVME_BUFFERS * nvme_buffer_bytes(architecture, cell, cluster)
    return total


def node_bytes(
    architecture: Architecture, cell: Cell, workload: Workload, cluster: Cluster, *, on_gpu: bool
) -> int:
    """Memory that a node needs for all its ranks; without GPUs, also what would lie on them."""
    if on_gpu:
        return host_bytes(architecture, cell, cluster)
    memory = predict_memory(architecture, cell, workload, replace(cluster, on_cpu=True))
    host = host_bytes(architecture, cell, cluster, _CPU_PROCESS_BYTES)
    return host + cluster.gpus_per_node * memory.allocated


def nvme_buffer_bytes(architecture: Architecture, cell: Cell, cluster: Cluster) -> int:
    """The greatest part of a block that one rank keeps."""
    return -(-max(map(cell.block_bytes, architecture.blocks())) // cluster.num_shards(cell))
