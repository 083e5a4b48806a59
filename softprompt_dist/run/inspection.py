"""A prompt file in words. Axes: P prompt, D model width, V vocabulary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from softprompt_dist.backbone.load import load_embedding, load_tokenizer, locate_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.errors import ConfigError, PromptFileError
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.file import PromptMetadata, load_prompt
from softprompt_dist.prompt.neighbours import nearest_pieces


def describe_prompt(path: Path) -> list[str]:
    """Lines with the metadata, the shape and the norms of the rows.

    Raises:
        PromptFileError: see `load_prompt`.
    """
    prompt_PD, metadata = load_prompt(path)
    norms_P = prompt_PD.norm(dim=-1)
    facts = {
        **{name: json.dumps(value) for name, value in _told(metadata)},
        "shape": f"{prompt_PD.shape[0]} x {prompt_PD.shape[1]}",
        "row_norms": f"min {norms_P.min():.4g}, mean {norms_P.mean():.4g}, max {norms_P.max():.4g}",
    }
    return [f"{name:<22}{text}" for name, text in facts.items()]


def _told(metadata: PromptMetadata) -> Iterator[tuple[str, Any]]:
    """Its facts, those of the backbone first."""
    facts = dataclasses.asdict(metadata)
    for name, value in facts.pop("identity").items():
        yield "backbone" if name == "path" else f"backbone_{name}", value
    yield from facts.items()


def describe_neighbours(
    path: Path, backbone_path: str, *, num_neighbours: int, num_rows: int | None, force: bool
) -> list[str]:
    """A line for each row (the first `num_rows`) with the nearest pieces and their cosines.

    Raises:
        ConfigError: started as several ranks.
        BackboneError: the backbone cannot be loaded.
        PromptFileError: the prompt belongs to another backbone (unless `force`) or width.
    """
    if ranks.world_size() > 1:
        raise ConfigError(
            f"softprompt inspect was started as {ranks.world_size()} ranks, but is one process. "
            "Start it without a launcher."
        )
    config = BackboneConfig(path=backbone_path, sharding="replicated")
    tokenizer = load_tokenizer(locate_backbone(config))
    embedding, identity = load_embedding(config)
    identity = dataclasses.replace(identity, tokenizer=tokenizer_identity(tokenizer))
    prompt_PD, _ = load_prompt(path, backbone=identity, force=force)
    if prompt_PD.shape[1] != embedding.table_VD.shape[1]:
        raise PromptFileError(
            f"{path} has rows of width {prompt_PD.shape[1]}, but {backbone_path} has width "
            f"{embedding.table_VD.shape[1]}. Use the backbone it was tuned for."
        )
    # Tables are padded beyond the vocabulary; those rows are no pieces.
    num_pieces = min(len(tokenizer), len(embedding.table_VD))
    table_VD = embedding(torch.arange(num_pieces)).cpu()
    nearest = nearest_pieces(prompt_PD[:num_rows], table_VD, num_neighbours)
    rows = zip(nearest.ids_PK.tolist(), nearest.cosines_PK.tolist(), strict=True)
    return [
        f"{row:<6}{_with_cosines(tokenizer.convert_ids_to_tokens(ids), cosines)}"
        for row, (ids, cosines) in enumerate(rows)
    ]


def _with_cosines(pieces: Sequence[str], cosines: Sequence[float]) -> str:
    # Through JSON, so that a piece with a control character stays one word on its line.
    return "  ".join(
        f"{json.dumps(piece, ensure_ascii=False)[1:-1]} {cosine:.3f}"
        for piece, cosine in zip(pieces, cosines, strict=True)
    )
