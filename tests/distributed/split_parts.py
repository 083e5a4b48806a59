"""What one rank of the test of parts does: load a backbone sharded, and keep its part of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.parallel import ranks


def save_parts(folders: list[str], quantizations: list[str]) -> list[list[str]]:
    """Files of each folder's parts on this rank, one for each quantization."""
    return [[_save_part(Path(f), q) for q in quantizations] for f in folders]


def _save_part(folder: Path, quantization: str) -> str:
    config = BackboneConfig(path=str(folder), sharding="zero3", quantization=quantization)
    parts: dict[str, Any] = {
        name: part.contiguous()
        for name, part in load_backbone(config).held_tensors()
        if name.endswith(".flat")
    }
    file = folder / f"part-{quantization}-{ranks.world_size()}-{ranks.rank()}"
    save_file(parts, file)
    return str(file)
