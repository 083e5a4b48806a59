"""Every rank must judge the nodes alike: one that went on alone would wait for the others."""

from __future__ import annotations

import pytest

from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import groups, ranks

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
