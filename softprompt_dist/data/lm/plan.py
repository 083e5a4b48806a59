"""What a global batch will consist of, and what every objective must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from softprompt_dist.data.lm.order import Order
from softprompt_dist.data.lm.packing import Layout
from softprompt_dist.data.lm.pieces import Stretches
from softprompt_dist.data.lm.rows import RowBatch


@dataclass(frozen=True)
class BatchPlan:
    """A global batch before any token of it is read; the same on every rank."""

    num_rows: int
    first_example: int
    """Position in the run of the first example."""
    examples_consumed: int
    """Position behind the last one: where the next batch begins."""
    seed: int
    """Key of the random choices that go with positions."""
    stretches: Stretches
    """Where the text of each example lies."""
    num_real_tokens: int
    """Positions of all rows, both sides, that are not padding."""
    layout: Layout | None = None
    """Which example goes where; None: one a row, filling it."""


class Objective(Protocol):
    """A corpus as examples, and examples as rows."""

    @property
    def num_examples(self) -> int:
        """Of an epoch."""

    @property
    def inputs_length(self) -> int | None:
        """Encoder positions of a row; None without encoder."""

    @property
    def targets_length(self) -> int:
        """Decoder positions of a row."""

    def plan(self, order: Order, first: int, num_rows: int) -> BatchPlan:
        """`num_rows` rows of the examples of `order` from position `first` on."""

    def plan_of_examples(self, order: Order, num_examples: int) -> BatchPlan:
        """The first so many examples of `order`, in as many rows as they need."""

    def rows(self, plan: BatchPlan, first: int, last: int) -> RowBatch:
        """Rows [first, last) of a plan."""
