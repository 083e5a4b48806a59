"""Plain language modelling for decoder-only backbones: rows of running text."""

from __future__ import annotations

import numpy as np
import torch

from softprompt_dist.data.batching import IGNORED_LABEL
from softprompt_dist.data.lm.order import Order
from softprompt_dist.data.lm.pieces import EqualPieces, RunningText
from softprompt_dist.data.lm.plan import BatchPlan
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.token_source import TokenSource


class NextToken:
    """Each position predicts the next; documents follow one another behind end-of-sequence."""

    inputs_length = None

    def __init__(self, corpus: TokenSource, special: SpecialIds, targets_length: int) -> None:
        """Number the positions of the running text."""
        self.targets_length = targets_length
        self._text = RunningText(corpus, special.eos)
        self._pieces = EqualPieces(self._text.num_tokens, targets_length)

    @property
    def num_examples(self) -> int:
        """Of an epoch."""
        return len(self._pieces)

    def plan(self, order: Order, first: int, num_rows: int) -> BatchPlan:
        """`num_rows` rows of one example each."""
        stretches = self._pieces.stretches(order.indices(first, num_rows))
        real = num_rows * self.targets_length
        return BatchPlan(num_rows, first, first + num_rows, order.seed, stretches, real)

    def plan_of_examples(self, order: Order, num_examples: int) -> BatchPlan:
        """The first so many examples."""
        return self.plan(order, 0, num_examples)

    def rows(self, plan: BatchPlan, first: int, last: int) -> RowBatch:
        """Rows [first, last) of a plan."""
        ids_BT = self._text.read(plan.stretches.starts[first:last], self.targets_length)
        labels_BT = np.full_like(ids_BT, IGNORED_LABEL)
        labels_BT[:, :-1] = ids_BT[:, 1:]
        return RowBatch(
            decoder_input_ids_BT=torch.from_numpy(ids_BT),
            labels_BT=torch.from_numpy(labels_BT),
            target_segments_BT=torch.from_numpy(np.ones_like(ids_BT)),
            is_packed=False,
            has_padding=False,
            num_real_tokens=ids_BT.size,
        )
