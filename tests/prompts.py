"""Prompt files that nobody tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from softprompt_dist.backbone.load import load_embedding
from softprompt_dist.config import BackboneConfig
from softprompt_dist.prompt.file import PromptMetadata, save_prompt
from tests import runs


def save_untuned(run_dir: Path, recipe: Mapping[str, Any]) -> Path:
    """A random prompt, large enough for answers to differ, with the config.yaml of a run."""
    runs.write_recipe(run_dir / "config.yaml", recipe)
    backbone = BackboneConfig(**recipe["backbone"])
    embedding, identity = load_embedding(backbone)
    shape = recipe["prompt"]["prompt_length"], embedding.table_VD.shape[1]
    path = run_dir / "prompt" / "best.safetensors"
    metadata = PromptMetadata(
        identity=identity,
        task=recipe["task"]["name"],
        initialisation="random",
        step=0,
        metric="accuracy",
        score=0.0,
        prompt_length=shape[0],
        d_model=shape[1],
        version="",
        task_family="own: fish, fruit, root",
    )
    save_prompt(path, torch.randn(shape, generator=torch.Generator().manual_seed(1)), metadata)
    return path
