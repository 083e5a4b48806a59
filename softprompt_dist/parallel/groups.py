"""Groups of ranks that share a node."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import local_world_size

_PROBE = timedelta(seconds=60)


def shard_group(kind: Literal["world", "node"]) -> dist.ProcessGroup | None:
    """All ranks: the ranks over which a backbone is cut; None for all of them.

    Raises:
        MachineError: nodes have different numbers of ranks, or one each.
    """
    if kind == "world" or ranks.world_size() == 1:
        return None
    size = _node_size()
    if size == ranks.world_size():
        return None
    mine: dist.ProcessGroup | None = None
    for first in range(0, ranks.world_size(), size):
        members = list(range(first, first + size))
        group = dist.new_group(members)  # every rank makes every group
        if ranks.rank() in members:
            mine = group
    return mine


def cpu_group_problem() -> str:
    """All ranks: why they cannot have a group for tensors on the CPU; empty if they can.

    Beside NCCL it has a network of its own to find: gloo takes the interface of the host's name.
    """
    if ranks.world_size() == 1:
        return ""
    problem, group = "", None
    try:
        group = dist.new_group(backend="gloo", timeout=_PROBE)
        dist.barrier(group)
    except RuntimeError as error:
        problem = f"rank {ranks.rank()} on {socket.gethostname()}: {str(error).splitlines()[0]}"
    problems = [said for said in ranks.gather_objects(problem) if said]
    if group is not None:
        dist.destroy_process_group(group)
    return problems[0] if problems else ""


def _node_size() -> int:
    """All ranks: how many of them each node has. Judged by what all said, so all judge alike."""
    hosts = ranks.gather_objects((socket.gethostname(), local_world_size(os.environ)))
    size = hosts[0][1]
    runs = [hosts[first : first + size] for first in range(0, len(hosts), size)]
    if any(set(run) != {(run[0][0], size)} or len(run) < size for run in runs):
        raise _on_all_ranks(
            f"backbone.shard_group is 'node', but the ranks' nodes and sizes are {hosts}; every "
            "node must have as many ranks as the others, in one row. Set shard_group=world."
        )
    if size == 1:
        raise _on_all_ranks(
            "backbone.shard_group is 'node', but each node has one rank only, so nothing would be "
            "cut. Set backbone.sharding=replicated, or shard_group=world."
        )
    return size


def _on_all_ranks(message: str) -> MachineError:
    error = MachineError(message)
    error.on_all_ranks = True
    return error
