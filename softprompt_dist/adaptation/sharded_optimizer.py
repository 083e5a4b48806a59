"""What optimizers share that see only stretches of the parameters they update.

An update is what it would be if the parameters were whole: whatever concerns a whole parameter is
summed over the ranks first.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.adaptation.fragments import Fragment, Layout
from softprompt_dist.adaptation.sharded_tensor import ShardedTensor
from softprompt_dist.parallel import ranks

SMALLEST_SCALE = 1e-3
"""Where steps are relative to a parameter's root mean square, it counts as at least this."""
_MAX_BLOCK = 1 << 22
"""Elements that are worked on at a time: temporary memory stays small beside the weights."""


@dataclass
class UpdateSize:
    """Sums over all weights of an update; both are 0 until one was made."""

    squared_change: float = 0.0
    squared_weight: float = 0.0
    """Before the change."""
    num_weights: int = 0

    @property
    def rms(self) -> float:
        """Root mean square of the change."""
        return math.sqrt(self.squared_change / max(self.num_weights, 1))

    @property
    def relative_rms(self) -> float:
        """The same over the root mean square of the weights."""
        return math.sqrt(self.squared_change / max(self.squared_weight, 1e-30))


class ShardedOptimizer(torch.optim.Optimizer):
    """Updates flat fp32 tensors as their `Layout` says; gradients are used up.

    DeepSpeed is given it before the layout exists: `bind` follows once the engine does.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        self._layout: Layout | None = None
        self.num_updates = 0
        """Begun since the run began, in all attempts."""
        self.update_size = UpdateSize()
        """Of the latest update, over all ranks."""

    def bind(self, layout: Layout) -> None:
        """Tell what lies where; the same on all ranks but for sizes."""
        self._layout = layout

    def begin_update(self) -> None:
        """Count one more update, which ZeRO-3 makes in one `step` for each of its groups."""
        self.num_updates += 1
        self.update_size = UpdateSize()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """All ranks: update every flat tensor that has a gradient."""
        if self._layout is None or closure is not None:
            raise RuntimeError("A sharded optimizer needs its layout first, and takes no closure.")
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self.update(flat, self._layout.flats[flat], group)

    @abstractmethod
    def update(self, flat: Tensor, fragments: list[Fragment], group: dict[str, Any]) -> None:
        """All ranks: move the fragments of `flat` by its gradient, in place."""

    @abstractmethod
    def sharded_state(self) -> dict[str, ShardedTensor]:
        """State that lies like the weights; made (as zeros) where there is none yet."""

    @abstractmethod
    def small_state(self) -> dict[str, Tensor]:
        """State that every rank has whole, on its device; made where there is none yet."""

    @property
    def layout(self) -> Layout:
        """What lies where."""
        assert self._layout is not None
        return self._layout

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks if they hold different stretches; in fp32 as they are."""
        if not self.layout.is_sharded or ranks.world_size() == 1:
            return values
        summed = ranks.all_reduce_sum(values.to(ranks.device()))  # off-loaded ones lie elsewhere
        return summed.to(values.device)

    def record(self, fragments: list[Fragment], changes: list[float], weights: list[float]) -> None:
        """Add squared changes and weights, one sum a parameter, to the size of this update."""
        self.update_size.squared_change += sum(changes)
        self.update_size.squared_weight += sum(weights)
        self.update_size.num_weights += sum(fragment.numel for fragment in fragments)


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix that lies in a fragment without gaps."""

    row: int
    column: int
    rows: int
    columns: int
    start: int
    """Index of its first element in the fragment."""

    def of(self, values: Tensor) -> Tensor:
        """[rows, columns] of a fragment's values, as a view."""
        return values[self.start : self.start + self.rows * self.columns].view(self.rows, -1)

    @property
    def row_range(self) -> slice:
        """Rows of the matrix."""
        return slice(self.row, self.row + self.rows)

    @property
    def column_range(self) -> slice:
        """Columns of the matrix."""
        return slice(self.column, self.column + self.columns)


def blocks(fragment: Fragment) -> Iterator[Block]:
    """A matrix's fragment as rectangles: perhaps a row's end, whole rows, a row's beginning."""
    width = fragment.shape[1]
    done = 0
    while done < fragment.size:
        row, column = divmod(fragment.first + done, width)
        left = fragment.size - done
        if column or left < width:
            rows, columns = 1, min(width - column, left)
        else:
            rows, columns = min(left // width, max(1, _MAX_BLOCK // width)), width
        yield Block(row, column, rows, columns, done)
        done += rows * columns


def squared_sum(values: Tensor) -> Tensor:
    """Sum of squares as a scalar, without a copy of the values."""
    return torch.linalg.vector_norm(values, dtype=torch.float32).square()
