"""Gathered blocks do not pile up: in which order blocks are gathered, computed and freed.

A stand-in takes the place of a GPU that lags as far behind the host as it is let: it computes
nothing until somebody waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_dist.backbone import gather_limit
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.parallel.join import join_world
from tests.models import save_deep_t5

NUM_BLOCKS = 8
BLOCKS_AT_A_TIME = 3
"""One that computes, the next one, and the one that is gathered meanwhile."""


@dataclass
class LaggingDevice:
    """Computes what was launched only up to an event that the host waits for."""

    launched: list[int] = field(default_factory=list)
    """Ids of the freed blocks, in the order in which their computations were launched."""
    num_computed: int = 0
    whole: set[int] = field(default_factory=set)
    """Gathered and not freed."""
    held: list[int] = field(default_factory=list)
    """At each gather: how many blocks lie whole on the device, with that one."""
    unfinished: list[list[int]] = field(default_factory=list)
    """At each gather: the freed blocks whose computation has not ended."""

    def event(self) -> Event:
        return Event(self, len(self.launched))

    def gather(self, block: int) -> None:
        self.whole.add(block)
        self.unfinished.append(self.launched[self.num_computed :])
        self.held.append(len(self.whole) + len(self.unfinished[-1]))

    def free(self, block: int) -> None:
        self.whole.remove(block)
        self.launched.append(block)


@dataclass
class Event:
    device: LaggingDevice
    position: int

    def synchronize(self) -> None:
        self.device.num_computed = max(self.device.num_computed, self.position)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep_t5(tmp_path_factory.mktemp("deep") / "t5", NUM_BLOCKS)


def watch(backbone: Backbone, device: LaggingDevice) -> None:
    """Tell the device of every gather that is launched and of every block that is freed."""
    add = backbone.traffic.add

    def gathered(parameters: list[Any]) -> None:
        add(parameters)
        for parameter in parameters:
            device.gather(parameter.ds_id)

    backbone.traffic.add = gathered  # type: ignore[method-assign, assignment]
    for block in backbone.blocks():
        flat: Any = block.flat

        def freed(*given: Any, flat: Any = flat, free: Any = flat.partition, **named: Any) -> None:
            device.free(flat.ds_id)
            free(*given, **named)

        flat.partition = freed


def batch() -> TokenBatch:
    ids_BS = torch.ones(2, 6, dtype=torch.long)
    return TokenBatch(ids_BS, torch.ones_like(ids_BS), ids_BS[:, :3], torch.ones(2, 3))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.usefixtures("lone_process")
def test_a_block_is_gathered_when_the_one_three_before_has_been_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    device = LaggingDevice()
    monkeypatch.setattr(gather_limit, "compute_event", device.event)
    join_world()
    section = {"path": str(folder), "sharding": "zero3", "activation_checkpointing": checkpointing}
    backbone = load_backbone(BackboneConfig.model_validate(section))
    watch(backbone, device)
    prompt_BPD = torch.randn(2, 4, backbone.d_model, requires_grad=True)
    for _ in range(3):  # from the third pass on, DeepSpeed gathers the next block ahead
        backbone(prompt_BPD, batch()).float().sum().backward()
        backbone.release()
    gathers_of_a_step = 2 * (NUM_BLOCKS + 1) - 2
    assert max(device.held) == BLOCKS_AT_A_TIME
    # The block just before may still be at work, so that the device need not wait for the host.
    assert {len(blocks) for blocks in device.unfinished[-gathers_of_a_step:]} == {1}
    with torch.no_grad():
        for _ in range(3):
            backbone(prompt_BPD, batch())
    assert max(map(len, device.unfinished)) == 1
