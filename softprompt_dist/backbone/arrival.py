"""Proof that every stored tensor arrived: what the ranks hold is compared with the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.filling import encoded_rows, overlap, pieces
from softprompt_dist.backbone.flat_weights import FrozenBlock, Slot
from softprompt_dist.backbone.inventory import Inventory
from softprompt_dist.errors import BackboneError
from softprompt_dist.parallel import ranks


def assert_all_arrived(backbone: Backbone, inventory: Inventory) -> None:
    """All ranks: together they hold each tensor's every byte, and the bytes are the stored ones.

    Each rank reads its rows once more and compares them with what it holds; one sum over the ranks
    then shows whether a byte is held by none.

    Raises:
        BackboneError: on all ranks, naming the tensors.
    """
    names = sorted(inventory.stored)
    state = ranks.together(lambda: _state(backbone, inventory))
    copies = _number_of_copies(backbone)
    counts = torch.tensor([state[name] for name in names], dtype=torch.int64)
    held, wrong = ranks.all_reduce_sum(counts.to(ranks.device())).T.tolist()
    sizes = {slot.name: slot.end - slot.start for b in backbone.blocks() for slot in b.slots}
    lost = [n for n, count in zip(names, held, strict=True) if count != copies(n, sizes.get(n, 1))]
    changed = [name for name, count in zip(names, wrong, strict=True) if count]
    if lost or changed:
        error = BackboneError(
            f"Backbone {backbone.path} did not load whole: {len(lost)} tensors are not held in "
            f"full ({lost[:5]}), {len(changed)} differ from the files ({changed[:5]}). A prompt "
            "tuned on it would be worthless. Was the checkpoint being written? Start again, and "
            "report this if it stays."
        )
        error.on_all_ranks = True
        raise error


def _number_of_copies(backbone: Backbone) -> Any:
    world_size = ranks.world_size()
    flats = [block.flat for block in backbone.blocks() if block.flat is not None]
    parts = getattr(flats[0], "ds_zero_partition_world_size", 1) if flats else 1
    slots = {slot.name for block in backbone.blocks() for slot in block.slots}

    def copies(name: str, size: int) -> int:
        return size * world_size // (parts if name in slots else 1)

    return copies


def _state(backbone: Backbone, inventory: Inventory) -> dict[str, tuple[int, int]]:
    """Name -> bytes that this rank holds (1 for a whole tensor) and whether they differ."""
    whole = dict.fromkeys(inventory.stored, (1, 0))
    for name, (module, attribute) in inventory.skeleton.buffers.items():
        held: Tensor = getattr(module, attribute)
        whole[name] = (1, int(not _same(held, inventory.reader.tensor(inventory.stored[name]))))
    table_VD = backbone.embedding.table_VD
    embedding = inventory.skeleton.embedding
    stored = inventory.reader.tensor(inventory.stored[embedding])
    whole[embedding] = (1, int(not _same(table_VD, stored)))
    for block in backbone.blocks():
        with _part(block) as (held, first_byte):
            for slot in block.slots:
                whole[slot.name] = _compare(
                    slot, held[: block.num_bytes - first_byte], first_byte, inventory
                )
    return whole


def _compare(slot: Slot, held: Tensor, first_byte: int, inventory: Inventory) -> tuple[int, int]:
    count = wrong = 0
    last_byte = first_byte + len(held)
    for rows in pieces(slot, first_byte, last_byte):
        stored = inventory.stored[slot.name]
        expected = encoded_rows(inventory.reader, stored, slot.format, rows).view(-1)
        start, end = overlap(slot, rows, first_byte, last_byte)
        row_start = slot.start + rows.start * slot.row_bytes
        expected = expected[start - row_start : end - row_start]
        found = held[start - first_byte : end - first_byte]
        wrong |= not torch.equal(found.cpu(), expected)
        count += end - start
    return count, int(wrong)


@contextmanager
def _part(block: FrozenBlock) -> Iterator[tuple[Tensor, int]]:
    """What this rank holds of a block, and the first byte of it."""
    flat: Any = block.flat
    if not hasattr(flat, "ds_tensor"):
        yield flat.detach(), 0
        return
    first_byte = flat.ds_zero_partition_rank * flat.ds_tensor.ds_numel
    on_disk = flat.ds_tensor.status.name == "NOT_AVAILABLE"
    if on_disk:
        flat.nvme_swapper.swap_in([flat], async_op=False)
    yield flat.ds_tensor.detach(), first_byte
    if on_disk:
        flat.nvme_swapper.remove_partition_and_release_buffers([flat])


def _same(held: Tensor, stored: Tensor) -> bool:
    return held.shape == stored.shape and torch.equal(held.cpu(), stored.to(held.dtype))
