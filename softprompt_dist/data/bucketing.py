"""Rows of about one length make a batch, so that little of it is padding.

Pure functions of lengths in tokens: every rank computes the same cut without a word to the others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class MicroBatchLimit:
    """What a device computes at once: so many rows, or so many positions."""

    rows: int | None = None
    positions: int | None = None
    """Rows times (prompt, longest input and longest target). Exactly one of the two is given."""
    prompt_length: int = 0

    def __post_init__(self) -> None:
        """Refuse a limit that is none.

        Raises:
            ValueError: both or neither of rows and positions, or fewer than 1.
        """
        given = [value for value in (self.rows, self.positions) if value is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(f"Limit micro-batches by rows or positions of at least 1, not {self}.")

    @property
    def units(self) -> int:
        """The limit as a number of rows or positions, whichever it counts."""
        return self.rows or self.positions or 0

    def cost(self, num_rows: int, longest_input: int, longest_target: int) -> int:
        """Units that a micro-batch takes, its padding included."""
        if self.positions is None:
            return num_rows
        return num_rows * (self.prompt_length + longest_input + longest_target)


def batches_by_length(
    lengths: Lengths, *, prompt_length: int, budget: int, extra: int = 0
) -> list[list[int]]:
    """Indices longest first, in batches of as many rows as fit the budget, and at least one.

    rows x (prompt_length + longest + extra) <= budget. The batches do not depend on the number of
    ranks, so that sums over a batch are the same to the bit however many share the work.

    Args:
        lengths: tokens of each row, at least 1.
        prompt_length: positions of the prompt, which every row has.
        budget: positions in a batch.
        extra: further positions that every row has.

    Raises:
        ValueError: the budget is below 1.
    """
    if budget < 1:
        raise ValueError(f"A budget must be at least 1 position, not {budget}.")
    lengths_N = np.asarray(lengths, dtype=np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    batches, start = [], 0
    while start < len(order_N):
        width = prompt_length + int(lengths_N[order_N[start]]) + extra
        rows = max(1, budget // width)
        batches.append(order_N[start : start + rows].tolist())
        start += rows
    return batches


def micro_batches_by_length(
    input_lengths: Lengths, target_lengths: Lengths, limit: MicroBatchLimit, world_size: int
) -> list[list[int]]:
    """Positions of one global batch's rows, in micro-batches; as many for every rank.

    Every row is in exactly one micro-batch. As few as the limit allows, rounded up to a multiple of
    the ranks; these are then made about equally large, since ranks wait for the largest of a round.
    The costliest come first, for `dealt`. Where the rows do not go round, the last are empty: the
    rank that gets one must still reach every collective, with a row that counts nothing.

    Args:
        input_lengths: tokens of each row's input.
        target_lengths: tokens of each row's target.
        limit: what a micro-batch may take; one row may take more.
        world_size: number of ranks.
    """
    columns = np.asarray(input_lengths).tolist(), np.asarray(target_lengths).tolist()
    shapes = list(zip(*columns, strict=True))
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i][0], -shapes[i][1], i))
    rows = _SortedRows([shapes[i] for i in order], limit)
    wanted = -(-len(rows.cut(limit.units)) // world_size) * world_size
    levels = range(1, limit.units + 1)
    lowest = levels[bisect_left(levels, True, key=lambda units: len(rows.cut(units)) <= wanted)]
    parts = rows.split_costliest(rows.cut(lowest), wanted)
    parts.sort(key=rows.cost, reverse=True)
    batches = [[order[place] for place in part] for part in parts]
    return batches + [[] for _ in range(wanted - len(batches))]


def dealt(micro_batches: Sequence[T], rank: int, world_size: int) -> list[T]:
    """A rank's share of the costliest-first micro-batches: one of each round, back and forth.

    The number of micro-batches is a multiple of the ranks.
    """
    rounds = range(0, len(micro_batches), world_size)
    places = (rank if turn % 2 == 0 else world_size - 1 - rank for turn in range(len(rounds)))
    return [micro_batches[start + place] for start, place in zip(rounds, places, strict=True)]


@dataclass(frozen=True)
class _SortedRows:
    """Tokens of each row's (input, target), longest input first; parts are ranges of them."""

    shapes: Sequence[tuple[int, int]]
    limit: MicroBatchLimit

    def cost(self, part: range) -> int:
        longest_target = max(self.shapes[place][1] for place in part)
        return self.limit.cost(len(part), self.shapes[part.start][0], longest_target)

    def cut(self, units: int) -> list[range]:
        """As few parts of at most `units`, or of one row, as there can be."""
        parts: list[range] = []
        start = longest_target = 0
        for place, (_, target) in enumerate(self.shapes):
            longest_target = max(longest_target, target)
            num_rows = place - start + 1
            cost = self.limit.cost(num_rows, self.shapes[start][0], longest_target)
            if num_rows > 1 and cost > units:
                parts.append(range(start, place))
                start, longest_target = place, target
        return [*parts, range(start, len(self.shapes))] if self.shapes else []

    def split_costliest(self, parts: Sequence[range], wanted: int) -> list[range]:
        """Halve the costliest part that has two rows, until there are as many as wanted."""
        split = list(parts)
        while len(split) < min(wanted, len(self.shapes)):
            chosen = max((part for part in split if len(part) > 1), key=self.cost)
            place, half = split.index(chosen), -(-len(chosen) // 2)
            split[place : place + 1] = [chosen[:half], chosen[half:]]
        return split
