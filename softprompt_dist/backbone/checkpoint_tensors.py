"""The tensors of a Hugging Face checkpoint folder, and proof that each one arrived in the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from softprompt_dist.errors import BackboneError


def checkpoint_files(folder: Path) -> list[Path]:
    """Weight files of a folder: safetensors (one or sharded), else PyTorch `.bin`.

    Raises:
        BackboneError: none there, or a shard that the index names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            files = [folder / name for name in names]
        else:
            files = [folder / f"{stem}.{suffix}"]
        if index.is_file() or files[0].is_file():
            missing = [f.name for f in files if not f.is_file()]
            if missing:
                raise BackboneError(f"Backbone {folder} lacks {missing}, which its index names.")
            return files
    raise BackboneError(
        f"Backbone {folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of "
        "shards). Point backbone.path at a Hugging Face checkpoint folder."
    )


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every stored tensor, one in memory at a time (memory-mapped)."""
    for file in checkpoint_files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as stored:
                    for name in stored.keys():  # noqa: SIM118 (not a mapping)
                        yield name, stored.get_tensor(name)
            else:
                yield from torch.load(
                    file, map_location="cpu", mmap=True, weights_only=True
                ).items()
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise BackboneError(f"Cannot read {file}: {error}. Fetch the file again.") from error


def assert_all_arrived(model: nn.Module, folder: Path, *, tied_head: bool) -> None:
    """Every parameter comes from the checkpoint, bit for bit, T5 v1.1's own head included.

    transformers 5.23 may tie a trained head to the embedding without a word; a model that lost it
    still runs, and tunes badly.

    Raises:
        BackboneError: a parameter has no stored tensor, or not its value.
    """
    state = model.state_dict(keep_vars=True)
    prefix = getattr(model, "base_model_prefix", "")
    arrived: set[int] = set()
    wrong: list[str] = []
    for name, stored in checkpoint_tensors(folder):
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        held = next((state[n] for n in names if n in state), None)
        if held is None:
            continue
        if held.shape == stored.shape and torch.equal(held, stored.to(held.dtype)):
            arrived.add(id(held))
        else:
            wrong.append(name)
    missing = [name for name, p in model.named_parameters() if id(p) not in arrived]
    if not tied_head and "lm_head.weight" in state and "lm_head.weight" not in wrong:
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        if state["lm_head.weight"] is embedding:
            missing.append("lm_head.weight")
    if wrong or missing:
        raise BackboneError(
            f"Backbone {folder} did not load whole: no stored value for {missing[:5]}, other "
            f"values than stored in {wrong[:5]} ({len(missing)} and {len(wrong)} tensors). A "
            "prompt tuned on it would "
            "be worthless. Check the checkpoint, and `tie_word_embeddings` in its config.json."
        )
