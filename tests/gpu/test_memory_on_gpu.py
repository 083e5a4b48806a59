"""Memory that torch reserves on a GPU and page-locks on its node."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.host_memory import pin_exactly
from softprompt_dist.parallel.join import join_world
from tests.models import save_deep_t5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("lone_process"),
]
MIB = 2**20


def test_page_locked_memory_is_not_rounded_up() -> None:
    assert pin_exactly()
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    pinned = torch.empty(33 * MIB, dtype=torch.uint8, pin_memory=True)
    grown = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert len(pinned) <= grown < 34 * MIB


def test_off_loaded_blocks_do_not_pile_up(tmp_path: Path) -> None:
    """The device is kept busy, so that the host could run ahead of it through all blocks."""
    num_blocks = 32
    join_world()
    folder = save_deep_t5(tmp_path / "t5", num_blocks)
    section = {"path": str(folder), "sharding": "zero3", "offload": "cpu"}
    backbone = load_backbone(BackboneConfig.model_validate(section))
    largest = max(block.num_bytes for block in backbone.blocks())
    ids_BS = torch.ones(2, 6, dtype=torch.long, device=ranks.device())
    batch = TokenBatch(
        ids_BS, torch.ones_like(ids_BS), ids_BS[:, :3], torch.ones_like(ids_BS[:, :3])
    )
    prompt_BPD = torch.randn(2, 4, backbone.d_model, device=ranks.device(), requires_grad=True)
    for _ in range(3):
        backbone(prompt_BPD, batch).float().sum().backward()
        backbone.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    torch.cuda._sleep(100_000_000)
    with torch.no_grad():
        backbone(prompt_BPD, batch)
    peak = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    assert peak < num_blocks / 2 * largest
