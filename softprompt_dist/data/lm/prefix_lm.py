"""Prefix LM: each document continued from a random point (T5's `c4_v220_prefix_lm`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softprompt_dist.data.lm.draws import random_prefix_lengths
from softprompt_dist.data.lm.order import Order
from softprompt_dist.data.lm.packing import FirstFit, Layout, complementary_pairs, one_per_row
from softprompt_dist.data.lm.pieces import DocumentPieces, EqualPieces, RunningText, Stretches
from softprompt_dist.data.lm.plan import BatchPlan
from softprompt_dist.data.lm.row_filling import RowShape, fill_rows
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.token_source import IdArray, TokenSource
from softprompt_dist.errors import ConfigError


class PrefixLM:
    """Pieces of at most inputs_length - 1 tokens, each split at a uniform point.

    Both sides get end-of-sequence, even where the text goes on; targets are cut to what fits
    targets_length. With `greedy`, examples share rows as long as both of their sides fit.
    """

    def __init__(
        self,
        corpus: TokenSource,
        special: SpecialIds,
        inputs_length: int,
        targets_length: int,
        *,
        greedy: bool,
    ) -> None:
        """Count the pieces of all documents."""
        self.inputs_length = inputs_length
        self.targets_length = targets_length
        self._corpus = corpus
        self._special = special
        self._greedy = greedy
        self._pieces = DocumentPieces(corpus, inputs_length - 1)

    @property
    def num_examples(self) -> int:
        """Of an epoch."""
        return len(self._pieces)

    def plan(self, order: Order, first: int, num_rows: int) -> BatchPlan:
        """`num_rows` rows; greedy: of examples until the next one fits nowhere."""
        if not self._greedy:
            stretches, sides = self._examples(order, first, num_rows)
            return self._plan(order, first, num_rows, stretches, one_per_row(*sides))
        packer = FirstFit(num_rows, self.inputs_length, self.targets_length)
        parts: list[Stretches] = []
        taken = fitted = 0
        while not parts or fitted == len(parts[-1].starts):
            # As many again each time; what is read too much goes into the next batch.
            count = max(num_rows, taken)
            stretches, sides = self._examples(order, first + taken, count)
            fitted = packer.add(*sides)
            parts.append(stretches)
            taken += fitted
        starts, lengths = (np.concatenate(arrays)[:taken] for arrays in zip(*parts, strict=True))
        return self._plan(order, first, num_rows, Stretches(starts, lengths), packer.layout)

    def plan_of_examples(self, order: Order, num_examples: int) -> BatchPlan:
        """The first so many examples, in as many rows as they need."""
        stretches, sides = self._examples(order, 0, num_examples)
        if not self._greedy:
            return self._plan(order, 0, num_examples, stretches, one_per_row(*sides))
        packer = FirstFit(num_examples, self.inputs_length, self.targets_length)
        packer.add(*sides)
        num_rows = int(packer.layout.rows.max()) + 1
        return self._plan(order, 0, num_rows, stretches, packer.layout)

    def rows(self, plan: BatchPlan, first: int, last: int) -> RowBatch:
        """Rows [first, last) of a plan."""
        chosen, layout = _rows_of(plan, first, last)
        starts, lengths = (array[chosen].tolist() for array in plan.stretches)
        pieces = [
            self._corpus.tokens(start, start + length)
            for start, length in zip(starts, lengths, strict=True)
        ]
        shape = RowShape(last - first, self.inputs_length, self.targets_length)
        return fill_rows(pieces, layout, shape, self._special, append_eos=True)

    def _examples(
        self, order: Order, first: int, count: int
    ) -> tuple[Stretches, tuple[IdArray, IdArray]]:
        """Where examples lie, and how long their two sides are with end-of-sequence."""
        stretches = self._pieces.stretches(order.indices(first, count))
        prefixes = random_prefix_lengths(stretches.lengths, order.seed, first)
        targets = np.minimum(stretches.lengths - prefixes, self.targets_length - 1)
        return stretches, (prefixes + 1, targets + 1)

    def _plan(
        self, order: Order, first: int, num_rows: int, stretches: Stretches, layout: Layout
    ) -> BatchPlan:
        after = first + len(stretches.starts)
        real = layout.num_real_tokens
        return BatchPlan(num_rows, first, after, order.seed, stretches, real, layout)


class PrefixLMPairs:
    """Complementary pairs: rows without padding, from running text (BigScience).

    A row takes two stretches of running text; the second is split where its prefix fills up what
    the first one's leaves of the encoder. Only documents end in end-of-sequence.
    """

    def __init__(
        self, corpus: TokenSource, special: SpecialIds, inputs_length: int, targets_length: int
    ) -> None:
        """Number the positions of the running text.

        Raises:
            ConfigError: the sides of a row differ in length.
        """
        if inputs_length != targets_length:
            raise ConfigError(
                f"inputs_length is {inputs_length} and targets_length {targets_length}, but "
                "packing complementary_pairs needs them equal: what the encoder leaves of two "
                f"stretches must fill the decoder. Set both to {max(inputs_length, targets_length)}"
                ", or packing to greedy."
            )
        self.inputs_length = inputs_length
        self.targets_length = targets_length
        self._special = special
        self._text = RunningText(corpus, special.eos)
        self._pieces = EqualPieces(self._text.num_tokens, inputs_length)

    @property
    def num_examples(self) -> int:
        """Of an epoch."""
        return len(self._pieces)

    def plan(self, order: Order, first: int, num_rows: int) -> BatchPlan:
        """`num_rows` rows of two examples each."""
        stretches = self._pieces.stretches(order.indices(first, 2 * num_rows))
        splits = random_prefix_lengths(stretches.lengths, order.seed, first)[::2]
        layout = complementary_pairs(splits, self.inputs_length)
        after, real = first + 2 * num_rows, layout.num_real_tokens
        return BatchPlan(num_rows, first, after, order.seed, stretches, real, layout)

    def plan_of_examples(self, order: Order, num_examples: int) -> BatchPlan:
        """The first so many examples; an odd one is left out."""
        return self.plan(order, 0, num_examples // 2)

    def rows(self, plan: BatchPlan, first: int, last: int) -> RowBatch:
        """Rows [first, last) of a plan."""
        chosen, layout = _rows_of(plan, first, last)
        pieces = self._text.read(plan.stretches.starts[chosen], self.inputs_length)
        shape = RowShape(last - first, self.inputs_length, self.targets_length)
        return fill_rows(list(pieces), layout, shape, self._special, append_eos=False)


def _rows_of(plan: BatchPlan, first: int, last: int) -> tuple[IdArray, Layout]:
    """Which examples lie in rows [first, last), and their layout with rows counted from `first`."""
    layout = plan.layout
    assert layout is not None
    chosen = np.flatnonzero((layout.rows >= first) & (layout.rows < last))
    parts = {name: array[chosen] for name, array in vars(layout).items()}
    part = Layout(**parts)
    return chosen, replace(part, rows=part.rows - first)
