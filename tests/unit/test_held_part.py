"""Weights that lie on a disk are part of what the checks of a run see."""

from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_dist.backbone.fingerprint import assert_unchanged, local_checksum
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import InvariantError

Status = Enum("Status", ["AVAILABLE", "NOT_AVAILABLE"])


class Disk:
    """What DeepSpeed's swapper does with a part: a constant stands for it while it is away."""

    def __init__(self, parts: dict[int, Tensor]) -> None:
        self.parts = parts
        self.in_memory: set[int] = set()

    def swap_in(self, parameters: list[Any], *, async_op: bool) -> None:
        assert not async_op
        for parameter in parameters:
            parameter.ds_tensor = part(self.parts[id(parameter)], Status.AVAILABLE)
            self.in_memory.add(id(parameter))

    def remove_partition_and_release_buffers(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            parameter.ds_tensor = part(torch.tensor(1).half(), Status.NOT_AVAILABLE)
            self.in_memory.discard(id(parameter))


def part(values: Tensor, status: Status) -> Any:
    return SimpleNamespace(detach=lambda: values, status=status)


def test_a_byte_that_changes_on_the_disk_changes_the_checksum(tiny_t5: Path) -> None:
    backbone = load_backbone(BackboneConfig(path=str(tiny_t5), sharding="replicated"))
    blocks: list[Any] = [block.flat for block in backbone.blocks()]
    disk = Disk({id(flat): flat.detach().clone() for flat in blocks})
    for flat in blocks:
        flat.nvme_swapper = disk
    disk.remove_partition_and_release_buffers(blocks)
    before = local_checksum(backbone)
    assert_unchanged(backbone, before)
    assert not disk.in_memory
    disk.parts[id(blocks[2])][1000] += 1
    with pytest.raises(InvariantError, match=r"changed on ranks \[0\]"):
        assert_unchanged(backbone, before)
