"""A tensor of which every rank holds some stretches, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a flattened tensor."""

    first: int
    """Index of the first in the flattened tensor."""
    values: Tensor
    """1-D view of the elements; writing to it changes the state itself."""

    @property
    def elements(self) -> range:
        """Their indices in the flattened tensor."""
        return range(self.first, self.first + len(self.values))


@dataclass(frozen=True)
class ShardedTensor:
    """This rank's part of a tensor; the parts of all ranks make it whole."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """None, one or several; no two overlap, here or on another rank, unless replicated."""
    is_replicated: bool = False
    """Whether every rank holds all of it, and the same."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)
