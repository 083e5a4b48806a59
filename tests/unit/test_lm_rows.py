"""Span corruption, next token, and what validation reads."""

import numpy as np
import pytest
import torch

from softprompt_dist.data.batching import IGNORED_LABEL
from softprompt_dist.data.lm.pieces import RunningText
from tests.lm_corpora import (
    EOS,
    FIRST_SENTINEL,
    PAD,
    SPECIAL,
    counting_corpus,
    data_of,
    some_lengths,
)

SPANS = {"objective": "span_corruption"}


def sentinels_filled_in(inputs, targets):
    """The text that a row of span corruption was made of."""
    spans, current = {}, []
    for token in targets:
        if token > FIRST_SENTINEL - SPECIAL.num_sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [piece for token in inputs for piece in spans.get(token, [token])]


def test_corrupted_rows_hold_the_text_without_padding():
    corpus = counting_corpus(some_lengths(100, 200))
    data = data_of(corpus, **SPANS, inputs_length=128, targets_length=40)
    assert (data.inputs_length, data.targets_length) == (128, 29)
    plan = data.plan(0, data.num_examples)
    batch = data.rows(plan, 0, plan.num_rows)
    assert not batch.is_packed
    assert not batch.has_padding
    assert batch.num_real_tokens == plan.num_real_tokens == plan.num_rows * (128 + 29)
    assert (batch.input_segments_BS == 1).all()
    assert (batch.target_segments_BT == 1).all()
    assert batch.input_ids_BS.shape == (plan.num_rows, 128)
    texts = []
    for inputs, decoder_inputs, labels in zip(
        batch.input_ids_BS.tolist(),
        batch.decoder_input_ids_BT.tolist(),
        batch.labels_BT.tolist(),
        strict=True,
    ):
        assert inputs.pop() == labels[-1] == EOS
        assert decoder_inputs == [PAD, *labels[:-1]]
        texts.append(sentinels_filled_in(inputs, labels[:-1]))
    whole = corpus.token_ids[: 141 * data.num_examples].reshape(-1, 141)
    assert sorted(texts) == whole.tolist()


def test_lengths_of_t5():
    data = data_of(counting_corpus([2000]), **SPANS, inputs_length=512, targets_length=114)
    assert (data.inputs_length, data.targets_length, data.num_examples) == (512, 114, 3)


def test_next_token_rows_are_running_text():
    corpus = counting_corpus(some_lengths(100, 20))
    data = data_of(corpus, objective="lm", targets_length=16)
    plan = data.plan(0, data.num_examples)
    batch = data.rows(plan, 0, plan.num_rows)
    assert batch.input_ids_BS is None
    assert data.inputs_length is None
    assert not batch.has_padding
    assert batch.num_real_tokens == plan.num_real_tokens == batch.num_positions
    text = RunningText(corpus, EOS).read(np.arange(data.num_examples) * 16, 16)
    assert sorted(batch.decoder_input_ids_BT.tolist()) == sorted(text.tolist())
    assert batch.labels_BT[:, :-1].equal(batch.decoder_input_ids_BT[:, 1:])
    assert (batch.labels_BT[:, -1] == IGNORED_LABEL).all()


OBJECTIVES = [
    {"packing": "none"},
    {"packing": "greedy"},
    {"packing": "complementary_pairs"},
    {**SPANS, "inputs_length": 64},
    {"objective": "lm"},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_validation_reads_the_same_examples_whatever_the_seed(settings):
    corpus = counting_corpus(some_lengths(200, 40))
    lengths = {"inputs_length": 32, "targets_length": 32}
    first = data_of(corpus, **{**lengths, **settings, "seed": 1})
    second = data_of(corpus, **{**lengths, **settings, "seed": 2})
    one = list(first.validation_batches(10, 4))
    other = list(second.validation_batches(10, 3))
    for name in ("decoder_input_ids_BT", "labels_BT", "target_segments_BT"):
        whole = torch.cat([getattr(batch, name) for batch in one])
        assert whole.equal(torch.cat([getattr(batch, name) for batch in other]))
    assert sum(len(batch.labels_BT) for batch in one) == first.validation_plan(10).num_rows


def test_validation_reads_the_first_documents():
    data = data_of(counting_corpus([6] * 50), inputs_length=32, targets_length=32)
    batches = list(data.validation_batches(9, 2))
    ids = torch.cat([b.input_ids_BS[b.input_segments_BS > 0] for b in batches]).tolist()
    labels = torch.cat([b.labels_BT[b.target_segments_BT > 0] for b in batches]).tolist()
    assert sorted(ids + labels) == sorted([EOS] * 18 + list(range(10, 64)))


def test_validation_may_be_shorter_than_asked_for():
    data = data_of(counting_corpus([5, 6]), packing="none", inputs_length=8, targets_length=8)
    assert [len(batch.labels_BT) for batch in data.validation_batches(100, 4)] == [2]


def test_examples_change_with_the_seed_and_between_epochs():
    corpus = counting_corpus([30] * 40)
    one = data_of(corpus, packing="none", inputs_length=32, targets_length=32, seed=1)
    two = data_of(corpus, packing="none", inputs_length=32, targets_length=32, seed=2)
    first = one.rows(one.plan(0, 40), 0, 40).input_ids_BS
    assert not first.equal(two.rows(two.plan(0, 40), 0, 40).input_ids_BS)
    assert not first.equal(one.rows(one.plan(40, 40), 0, 40).input_ids_BS)
