"""What one rank of the equivalence test does: one gradient of a fixed prompt on a fixed batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from softprompt_dist.backbone.fingerprint import assert_unchanged, local_checksum
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenExample, collate
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.step import accumulate_gradient
from tests.runs import PARTITION_EVERYTHING

EXAMPLES = (
    TokenExample((5, 6, 7, 8, 1), (20, 1)),
    TokenExample((9, 10, 1), (21, 22, 23, 1)),
    TokenExample((11, 12, 13, 14, 15, 16, 1), (24, 1)),
    TokenExample((17, 1), (25, 26, 1)),
)
Z_LOSS = 0.0


def gradients_on_this_rank(
    folders: dict[str, str], prompt_file: str, sharding: str
) -> dict[str, dict[str, Any]]:
    """`gradient_on_this_rank` for each model, by name."""
    return {
        name: gradient_on_this_rank(folder, prompt_file, sharding)
        for name, folder in folders.items()
    }


def gradient_on_this_rank(folder: str, prompt_file: str, sharding: str) -> dict[str, Any]:
    """Loss and prompt gradient over all ranks; the gradient goes to a file beside the weights."""
    config = BackboneConfig(path=folder, sharding=sharding, dropout=0.0)
    backbone = load_backbone(config, PARTITION_EVERYTHING if sharding == "zero3" else None)
    before = local_checksum(backbone)
    prompt = SoftPrompt(load_file(prompt_file)["prompt"])
    share = len(EXAMPLES) // ranks.world_size()
    mine = EXAMPLES[ranks.rank() * share : (ranks.rank() + 1) * share]
    # One row at a time: gradient accumulation must not change the mean either.
    batches = [collate([e], pad_id=0, family=backbone.family) for e in mine]
    metrics = accumulate_gradient(backbone, prompt, batches, Z_LOSS)
    assert_unchanged(backbone, before)
    assert prompt.weight.grad is not None
    result = Path(folder) / f"gradient-{sharding}-{ranks.world_size()}-{ranks.rank()}"
    save_file({"gradient": prompt.weight.grad.contiguous()}, str(result))
    return {
        "loss": metrics["loss"],
        "num_tokens": metrics["num_tokens"],
        "gradient_file": str(result),
        "identity": backbone.identity.digest,
        "live_elements": sum(block.flat.numel() for block in backbone.blocks()),
        "sharding": sharding,
        "threads": torch.get_num_threads(),
    }
