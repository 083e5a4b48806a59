"""Validation is the same however the rows are dealt, and every rank walks as far as the others."""

import pytest
import torch

from softprompt_dist.adaptation.measures import measure
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.parallel import ranks

FIRST_IDS = (1, 9, 3, 9, 5)
"""What is predicted at the beginning of each of five rows; 9 is a sentinel."""
DEALS = [((1, 3, 5), (9, 9)), ((), (1, 9, 3, 9, 5))]
"""What each of two ranks has of them."""


def row(first_id):
    ids_BT = torch.tensor([[first_id, 2]])
    return RowBatch(
        decoder_input_ids_BT=ids_BT,
        labels_BT=ids_BT,
        target_segments_BT=torch.ones_like(ids_BT),
        is_packed=False,
        has_padding=False,
        num_real_tokens=2,
    )


class CollectiveModel:
    """Every call is a collective, as under ZeRO-3; a rank that calls less often hangs the rest."""

    def __init__(self):
        self.num_calls = 0

    def _meet(self):
        self.num_calls += 1
        ranks.all_reduce_sum(torch.ones(1))

    def losses(self, batch):
        self._meet()
        first_id = batch.labels_BT[0, 0].float()
        return first_id + 0.5, first_id / 3, torch.tensor(batch.labels_BT.numel())

    def first_logits(self, batch):
        self._meet()
        return torch.nn.functional.one_hot(batch.labels_BT[:, 0], num_classes=12).float()


def measured_on_this_rank(shares):
    share = shares[ranks.rank()]
    model = CollectiveModel()
    found = measure(
        model,
        {"prefix_lm": [row(first_id) for first_id in share]},
        objective="prefix_lm",
        sentinel_ids=(8, 9),
        vocabulary_size=10,
    )
    return {**found, "num_calls": model.num_calls}


def measured_of_each(deals):
    return [measured_on_this_rank(shares) for shares in deals]


def test_uneven_shares_give_what_one_rank_measures(run_on_ranks):
    alone = measured_on_this_rank([FIRST_IDS])
    assert alone.pop("num_calls") == 2 * len(FIRST_IDS)
    said = run_on_ranks(measured_of_each, 2, deals=DEALS)
    for shares, first, second in zip(DEALS, *said, strict=True):
        assert first == second
        assert first.pop("num_calls") == 2 * max(map(len, shares))
        assert first == pytest.approx(alone, rel=1e-12)
        assert first["sentinel_leak"] == 40.0
