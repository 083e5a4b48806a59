"""Every rank must judge the nodes alike: one that went on alone would wait for the others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import groups, ranks
from softprompt_dist.parallel.join import join_world

UNEVEN = {
    "two and four": [("a", 2)] * 2 + [("b", 4)] * 4,
    "four and two": [("a", 4)] * 4 + [("b", 2)] * 2,
    "dealt in turns": [("a", 2), ("b", 2)] * 2,
    "one each": [("a", 1), ("b", 1)],
    "three, of which two are left": [("a", 3)] * 3 + [("b", 3)] * 2,
}


@pytest.mark.parametrize("case", UNEVEN)
def test_all_ranks_refuse_uneven_nodes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = UNEVEN[case]
    monkeypatch.setattr(ranks, "world_size", lambda: len(nodes))
    monkeypatch.setattr(ranks, "gather_objects", lambda _: nodes)
    for _, size in nodes:
        monkeypatch.setenv("LOCAL_SIZE", str(size))
        with pytest.raises(MachineError, match="shard_group=world") as refusal:
            groups.shard_group("node")
        assert refusal.value.on_all_ranks


def test_a_single_node_is_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "gather_objects", lambda _: [("a", 2)] * 2)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert groups.shard_group("node") is None


@pytest.mark.parametrize(("limit", "waits"), [(60.0, 7800.0), (9000.0, 9600.0)])
@pytest.mark.usefixtures("lone_process")
def test_any_group_waits_for_longer_than_a_watchdog(limit: float, waits: float) -> None:
    """Also one that DeepSpeed makes, which names no limit."""
    join_world(limit_seconds=limit)
    # Nor does the store end a wait that still has time: the ranks meet in it.
    assert distributed_c10d._get_default_store().timeout.total_seconds() == waits
    for group in (dist.group.WORLD, dist.new_group(range(1)), dist.new_group(backend="gloo")):
        made = group._get_backend(torch.device("cpu"))
        assert made.options._timeout.total_seconds() == waits
    assert distributed_c10d._get_default_timeout("nccl").total_seconds() == waits
