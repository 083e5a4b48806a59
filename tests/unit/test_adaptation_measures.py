"""Likelihoods of validation rows and the sentinel leak, on one rank."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from softprompt_dist.adaptation.measures import measure
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.run.loss import token_loss

SENTINELS = (9, 8)
VOCABULARY, PADDED_VOCABULARY = 10, 12


def rows(*labels):
    labels_BT = torch.tensor(labels)
    return RowBatch(
        decoder_input_ids_BT=labels_BT.clamp(min=0),
        labels_BT=labels_BT,
        target_segments_BT=(labels_BT >= 0).long(),
        is_packed=False,
        has_padding=True,
        num_real_tokens=int((labels_BT >= 0).sum()),
    )


class Table:
    """Predicts each position from the id it reads alone."""

    def __init__(self, logits_VV):
        self.logits_VV = logits_VV.requires_grad_()

    def losses(self, batch):
        logits_BTV = self.logits_VV[batch.decoder_input_ids_BT]
        return token_loss(logits_BTV, batch.labels_BT, z_loss=1e-2)

    def first_logits(self, batch):
        return self.logits_VV[batch.decoder_input_ids_BT[:, 0]]


@pytest.fixture
def table():
    torch.manual_seed(0)
    return Table(torch.randn(PADDED_VOCABULARY, PADDED_VOCABULARY))


def table_that_answers(answers):
    """Greedy: id -> the id behind it."""
    logits_VV = torch.zeros(PADDED_VOCABULARY, PADDED_VOCABULARY)
    for id_, answer in answers.items():
        logits_VV[id_, answer] = 5.0
    return Table(logits_VV)


def measured(table, given, objective="prefix_lm", sentinel_ids=SENTINELS):
    return measure(
        table,
        given,
        objective=objective,
        sentinel_ids=sentinel_ids,
        vocabulary_size=VOCABULARY,
    )


def test_likelihoods_are_sums_over_sums_and_not_means_of_batches(table):
    batches = [rows([3, 4, 5, 6], [1, 2, -100, -100]), rows([7, -100, -100, -100])]
    whole = rows([3, 4, 5, 6], [1, 2, -100, -100], [7, -100, -100, -100])
    logits_BTV = table.logits_VV[whole.decoder_input_ids_BT].detach()
    expected = cross_entropy(logits_BTV.flatten(0, 1), whole.labels_BT.flatten())
    log_z_BT = logits_BTV.logsumexp(dim=-1)[whole.labels_BT >= 0]
    found = measured(table, {"prefix_lm": batches})
    assert found["prefix_lm_nll"] == pytest.approx(float(expected), rel=1e-6)
    assert found["z_loss"] == pytest.approx(1e-2 * float(log_z_BT.square().mean()), rel=1e-5)


def test_every_objective_is_measured_and_z_loss_is_that_of_the_run(table):
    given = {"prefix_lm": [rows([3, 4])], "span_corruption": [rows([5, 6, 7])]}
    found = measured(table, given, objective="span_corruption")
    assert list(found) == ["prefix_lm_nll", "span_corruption_nll", "z_loss", "sentinel_leak"]
    alone = {"span_corruption": given["span_corruption"]}
    assert found["z_loss"] == measured(table, alone, objective="span_corruption")["z_loss"]


def test_the_leak_is_the_share_of_rows_whose_first_piece_would_be_a_sentinel():
    table = table_that_answers({1: 9, 2: 8, 3: 4, 4: 7})
    batches = [rows([1, 5], [2, 5], [3, 5]), rows([4, 1])]
    assert measured(table, {"prefix_lm": batches})["sentinel_leak"] == 50.0


def test_rows_of_the_embedding_that_are_no_piece_cannot_be_answered():
    table = table_that_answers({1: 11})
    table.logits_VV.data[1, 9] = 1.0
    assert measured(table, {"prefix_lm": [rows([1, 5])]})["sentinel_leak"] == 100.0


def test_without_sentinels_or_rows_nothing_is_said_of_them(table):
    assert list(measured(table, {"lm": [rows([1, 2])]}, "lm")) == ["lm_nll", "z_loss"]
    assert list(measured(table, {"prefix_lm": [rows([1, 2])]}, sentinel_ids=())) == [
        "prefix_lm_nll",
        "z_loss",
    ]
    assert measured(table, {"prefix_lm": []}) == {}
