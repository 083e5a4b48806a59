"""What one rank does in the tests of arrival: load while something goes wrong on rank 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from cells import Settings, load_cell

from softprompt_dist.backbone import load
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.flat_weights import Slot
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.parallel import ranks

Mutation = Callable[[], Any]
LAST_MATRIX = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
"""Of its block; so rank 1 holds it, whether in a part or whole."""


def load_with_mutations(
    folder: str, cells: dict[str, Settings], broken: dict[str, list[str]]
) -> dict[str, Any]:
    """Name of what went wrong -> what this rank was told; `broken` has a folder for each rank."""
    said = {}
    for cell, settings in cells.items():
        for name, mutation in MUTATIONS.items():
            with mutation() if ranks.rank() == 1 else nullcontext():
                said[f"{cell}, {name}"] = caught(folder, settings)
        for name, folders in broken.items():
            said[f"{cell}, {name}"] = caught(folders[ranks.rank()], settings)
        said[f"{cell}, whole again"] = caught(folder, settings)
    return said


def caught(folder: str, settings: Settings) -> tuple[str, str, bool] | None:
    """Type and text of the error, and whether it says that all ranks have it; else None."""
    try:
        load_cell(folder, settings)
    except SoftpromptError as error:
        return type(error).__name__, str(error), error.on_all_ranks
    return None


def _after_filling(change: Callable[[Backbone], None]) -> Mutation:
    """Something happens to the weights between reading and the proof."""

    def filled(*arguments: Any) -> Backbone:
        backbone = original(*arguments)
        with torch.no_grad():
            change(backbone)
        return backbone

    original = load.fill
    return lambda: mock.patch.object(load, "fill", filled)


def _flip_a_byte(backbone: Backbone) -> None:
    *_, block = backbone.blocks()
    part = getattr(block.flat, "ds_tensor", block.flat)
    part.view(-1)[7] ^= 1


def _nudge_a_norm(backbone: Backbone) -> None:
    backbone.model.encoder.final_layer_norm.weight[0] += 1e-3


@contextmanager
def _rows_left_out(chosen: Callable[[range], range]) -> Iterator[None]:
    """Not all rows of one matrix are copied, and something else is found in their place."""
    original = Slot.pieces

    def pieces(slot: Slot, *between: int) -> Iterator[range]:
        found = original(slot, *between)
        yield from filter(len, map(chosen, found)) if slot.name == LAST_MATRIX else found

    with mock.patch.object(Slot, "pieces", pieces):
        yield


MUTATIONS: dict[str, Mutation] = {
    "byte": _after_filling(_flip_a_byte),
    "norm": _after_filling(_nudge_a_norm),
    "slot": lambda: _rows_left_out(lambda rows: range(rows.start, rows.start)),
    "row": lambda: _rows_left_out(lambda rows: range(rows.start, rows.stop - 1)),
}
