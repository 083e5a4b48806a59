"""Which stored tensor belongs where in a model, decided before a weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.skeleton import Skeleton
from softprompt_dist.errors import BackboneError

_HARMLESS = re.compile(
    r"EncDecAttention\.relative_attention_bias\.weight$|rotary_emb\.inv_freq$"
    r"|embed_positions\.weights$|(^|\.)position_ids$|(^|\.)mtp(_layers)?\."
)
"""Stored by old checkpoints and used by no model; or heads that foretell tokens further on."""
_MASK = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$")
"""A causal mask [..., L, L], or the one number that it masks with."""


@dataclass
class Inventory:
    """A model without weights and the checkpoint for it, found to fit each other."""

    skeleton: Skeleton
    reader: CheckpointReader
    config: Any
    """The model's Hugging Face config."""
    stored: dict[str, str] = field(default_factory=dict)
    """Name in the model -> name in the checkpoint, for every tensor of the model."""
    sums: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name of a slot -> how many of its bytes this rank has read, and their sum."""

    @property
    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Of each small tensor that is stored: its name, the module and the attribute there."""
        for name, (module, attribute) in self.skeleton.buffers.items():
            if name in self.stored:
                yield name, module, attribute


def take_inventory(skeleton: Skeleton, reader: CheckpointReader, config: Any) -> Inventory:
    """Match the model's tensors with the stored ones.

    T5 v1.1's own head is a tensor like any other here. transformers 5.23 forces the tie of head and
    embedding for every T5, and under ZeRO-3 drops the stored head without a word.

    Raises:
        BackboneError: a tensor is missing, has another shape, holds codes in place of numbers, has
            no place in the model, or two different ones have the same.
    """
    inventory = Inventory(skeleton, reader, config)
    wanted = dict(_wanted(skeleton))
    by_name = {skeleton.aliases.get(name, name): name for name in reader.shapes}
    by_name |= {name: name for name in reader.shapes}
    shares_table = not skeleton.has_own_head and skeleton.embedding in by_name
    if shares_table and skeleton.head not in by_name:
        by_name[skeleton.head] = by_name[skeleton.embedding]
    for name in skeleton.computed - by_name.keys():
        del wanted[name]
    missing = sorted(name for name in wanted if name not in by_name)
    if skeleton.embedding not in by_name:
        missing.append(skeleton.embedding)
    if missing:
        raise BackboneError(_missing(missing, reader, skeleton))
    inventory.stored = {name: by_name[name] for name in [*wanted, skeleton.embedding]}
    _check_shapes(inventory, wanted)
    _check_numbers(inventory)
    _check_leftovers(inventory)
    _check_twins(inventory)
    return inventory


def _wanted(skeleton: Skeleton) -> Iterator[tuple[str, tuple[int, ...]]]:
    for linears in skeleton.linears.values():
        for _, _, linear in linears:
            yield linear.name, (linear.out_features, linear.in_features)
    for name, (module, attribute) in skeleton.buffers.items():
        yield name, tuple(getattr(module, attribute).shape)


def _missing(missing: list[str], reader: CheckpointReader, skeleton: Skeleton) -> str:
    message = (
        f"Backbone {reader.folder} lacks {len(missing)} tensors that its config.json asks for: "
        f"{missing[:5]}. "
    )
    if skeleton.head in missing:
        message += (
            "The config promises a head of its own, which is not the embedding; without it, a "
            "prompt tuned on this backbone would be worthless. "
        )
    return message + "Fetch the checkpoint again, or the config.json that belongs to it."


def _check_shapes(inventory: Inventory, wanted: dict[str, tuple[int, ...]]) -> None:
    shapes = inventory.reader.shapes
    wrong = [
        f"{name} is {shapes[inventory.stored[name]]}, not {shape}"
        for name, shape in wanted.items()
        if shapes[inventory.stored[name]] != shape
    ]
    if wrong:
        raise BackboneError(
            f"Backbone {inventory.reader.folder}: config.json and weights disagree about "
            f"{len(wrong)} tensors: {'; '.join(wrong[:5])}. Use the config.json that belongs to "
            "these weights."
        )


def _check_numbers(inventory: Inventory) -> None:
    reader, table = inventory.reader, inventory.stored[inventory.skeleton.embedding]
    codes = [n for n in set(inventory.stored.values()) if not reader.holds_numbers(n)]
    codes += [table] if table not in codes and reader.is_quantized(table) else []
    if codes:
        listed = [f"{name} ({reader.dtype(name)})" for name in sorted(codes)[:5]]
        raise BackboneError(
            f"Backbone {reader.folder} stores {len(codes)} tensors neither as floating-point "
            f"numbers nor as `softprompt convert` writes int8: {', '.join(listed)}. Set "
            "backbone.path to the original checkpoint, and backbone.quantization for a smaller one."
        )


def _check_leftovers(inventory: Inventory) -> None:
    used = set(inventory.stored.values())
    aliases = inventory.skeleton.aliases
    harmless = [_HARMLESS, *map(re.compile, inventory.skeleton.ignored)]
    left = [
        name
        for name, shape in inventory.reader.shapes.items()
        if name not in used and aliases.get(name) not in inventory.stored
        if not any(pattern.search(name) for pattern in harmless)
        if not (_MASK.search(name) and _is_mask(shape))
    ]
    if left:
        raise BackboneError(
            f"Backbone {inventory.reader.folder} holds {len(left)} tensors for which its "
            f"config.json has no place: {sorted(left)[:5]}. Use the config.json that belongs to "
            "these weights. If it is that one, and the model is whole without them, load the "
            "folder with transformers' from_pretrained and save it with save_pretrained: the copy "
            "leaves them out."
        )


def _is_mask(shape: tuple[int, ...]) -> bool:
    return math.prod(shape) == 1 or (len(shape) > 1 and shape[-2] == shape[-1])


def _check_twins(inventory: Inventory) -> None:
    """That a tensor which is stored under two names is the same under both."""
    reader, aliases = inventory.reader, inventory.skeleton.aliases
    for name in reader.shapes:
        used = inventory.stored.get(aliases.get(name, name), name)
        if used != name and not reader.are_equal(used, name):
            raise BackboneError(
                f"Backbone {reader.folder} holds {used} and {name}, which are different, but the "
                "model of its config.json has one table that serves as both. Use a checkpoint in "
                "which they are equal."
            )
