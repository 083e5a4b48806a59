"""Proof that every stored tensor arrived: what the ranks hold in the end is what was read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.flat_weights import Slot, held_part, row_ranges
from softprompt_dist.backbone.inventory import Inventory
from softprompt_dist.errors import BackboneError
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import counted

_WORD = 8
_PAGE_WORDS = 512


def assert_all_arrived(backbone: Backbone, inventory: Inventory) -> None:
    """All ranks: together they hold every byte of every tensor, as it was read.

    Each rank sums the bytes that it holds of each tensor, wherever they lie by now, and compares
    with the sums of reading; one sum over the ranks then shows a byte that none holds.

    Raises:
        BackboneError: on all ranks, naming the tensors.
    """
    names = sorted(inventory.stored)
    state = ranks.together(lambda: _state(backbone, inventory))
    counts = torch.tensor([state[name] for name in names], dtype=torch.int64)
    held, wrong = ranks.all_reduce_sum(counts.to(ranks.device())).T.tolist()
    expected = _expected_counts(backbone)
    lost = [n for n, count in zip(names, held, strict=True) if count != expected(n)]
    changed = [name for name, count in zip(names, wrong, strict=True) if count]
    if lost or changed:
        error = BackboneError(
            f"Backbone {backbone.path} did not load whole: {len(lost)} tensors are not held in "
            f"full ({lost[:5]}), {len(changed)} are not as they were read ({changed[:5]}). A "
            "prompt tuned on it would be worthless. Start again; if it stays, check this machine's "
            "memory and report it."
        )
        error.on_all_ranks = True
        raise error


def slot_sums(slot: Slot, part: Tensor, first_byte: int) -> tuple[int, int]:
    """Number and checksum of a slot's bytes in a part of its block that starts at `first_byte`.

    The checksum sums words of eight bytes, weighted by the page that they stand in, and wraps.
    """
    start = max(slot.start, first_byte) - first_byte
    end = min(slot.end, first_byte + len(part)) - first_byte
    if start >= end:
        return 0, 0
    inner_start, inner_end = -(-start // _WORD) * _WORD, end // _WORD * _WORD
    if inner_start >= inner_end:
        return end - start, int(part[start:end].sum())
    edges = int(part[start:inner_start].sum()) + int(part[inner_end:end].sum())
    return end - start, edges + _weighted_sum(part[inner_start:inner_end].view(torch.int64))


def _weighted_sum(words: Tensor) -> int:
    num_pages = len(words) // _PAGE_WORDS
    pages, rest = words[: num_pages * _PAGE_WORDS], words[num_pages * _PAGE_WORDS :]
    sums = pages.view(num_pages, _PAGE_WORDS).sum(dim=1)
    weights = torch.arange(1, num_pages + 1, device=words.device)
    return int((sums * weights).sum()) + int(rest.sum())


def _expected_counts(backbone: Backbone) -> Any:
    """Name -> bytes of it that all ranks together must hold; of a whole tensor, one per rank."""
    world_size = ranks.world_size()
    sizes: dict[str, int] = {}
    for block in backbone.blocks():
        parts = getattr(block.flat, "ds_zero_partition_world_size", 1)
        copies = world_size // parts
        sizes |= {slot.name: (slot.end - slot.start) * copies for slot in block.slots}
    return lambda name: sizes.get(name, world_size)


def _state(backbone: Backbone, inventory: Inventory) -> dict[str, tuple[int, int]]:
    """Name -> bytes that this rank holds (1 for a whole tensor), and whether they are wrong."""
    state = dict.fromkeys(inventory.stored, (1, 0))
    for name, module, attribute in inventory.buffers:
        stored = inventory.reader.tensor(inventory.stored[name])
        state[name] = (1, int(not _same(getattr(module, attribute), stored)))
    table_VD = backbone.embedding.table_VD
    if backbone.engine_config is None:  # else it lies in the mapped file itself
        name = inventory.skeleton.embedding
        state[name] = (1, int(not _same_rows(table_VD, inventory, inventory.stored[name])))
    for block in counted(list(backbone.blocks()), "checking the weights", "layers"):
        with held_part(block.flat) as part:
            for slot in block.slots:
                sums = slot_sums(slot, part, _first_byte(block.flat))
                state[slot.name] = (sums[0], int(sums != inventory.sums.get(slot.name)))
    return state


def _first_byte(flat: Any) -> int:
    """Of this rank's part of a block."""
    if not hasattr(flat, "ds_tensor"):
        return 0
    return int(flat.ds_zero_partition_rank * flat.ds_tensor.ds_numel)


def _same(held: Tensor, stored: Tensor) -> bool:
    return held.shape == stored.shape and torch.equal(held.cpu(), stored.to(held.dtype))


def _same_rows(held_RC: Tensor, inventory: Inventory, stored: str) -> bool:
    row_bytes = held_RC[0].numel() * held_RC.element_size()
    return all(
        _same(held_RC[rows.start : rows.stop], inventory.reader.rows(stored, rows.start, rows.stop))
        for rows in row_ranges(0, len(held_RC), row_bytes)
    )
