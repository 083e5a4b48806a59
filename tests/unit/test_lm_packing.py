"""Prefix LM in rows: every token once and in its place, alone, packed or in pairs."""

import numpy as np
import pytest

from softprompt_dist.data.batching import IGNORED_LABEL
from softprompt_dist.data.lm.pieces import RunningText
from tests.lm_corpora import EOS, PAD, counting_corpus, data_of, some_lengths


def segments_of(batch):
    """(inputs, decoder inputs, labels) of every example of a batch, row by row."""
    found = []
    for row in range(len(batch.labels_BT)):
        for segment in range(1, int(batch.input_segments_BS[row].max()) + 1):
            inputs = batch.input_segments_BS[row] == segment
            targets = batch.target_segments_BT[row] == segment
            found.append(
                (
                    batch.input_ids_BS[row][inputs].tolist(),
                    batch.decoder_input_ids_BT[row][targets].tolist(),
                    batch.labels_BT[row][targets].tolist(),
                )
            )
    return found


def pieces_of(corpus, piece_length):
    offsets = corpus.document_offsets.tolist()
    return sorted(
        corpus.tokens(start, min(start + piece_length, end)).tolist()
        for first, end in zip(offsets, offsets[1:], strict=False)
        for start in range(first, end, piece_length)
    )


@pytest.mark.parametrize("packing", ["none", "greedy"])
def test_an_epoch_holds_every_token_once(packing):
    corpus = counting_corpus(some_lengths(300, 80))
    data = data_of(corpus, packing=packing, inputs_length=32, targets_length=32)
    found, consumed = [], 0
    while consumed < data.num_examples:
        plan = data.plan(consumed, 1 if packing == "greedy" else data.num_examples)
        found += segments_of(data.rows(plan, 0, plan.num_rows))
        consumed = plan.examples_consumed
    found = found[: data.num_examples]
    assert all(inputs[-1] == EOS and labels[-1] == EOS for inputs, _, labels in found)
    joined = sorted(inputs[:-1] + labels[:-1] for inputs, _, labels in found)
    assert joined == pieces_of(corpus, 31)


@pytest.mark.parametrize("packing", ["none", "greedy", "complementary_pairs"])
def test_decoders_read_labels_behind_a_start_piece(packing):
    corpus = counting_corpus(some_lengths(300, 20))
    data = data_of(corpus, packing=packing, inputs_length=32, targets_length=32)
    plan = data.plan(0, 16)
    examples = segments_of(data.rows(plan, 0, 16))
    assert len(examples) >= 16
    for _, decoder_inputs, labels in examples:
        assert decoder_inputs == [PAD, *labels[:-1]]


@pytest.mark.parametrize("lengths", [(32, 32), (64, 16), (16, 64)])
def test_greedy_rows_are_well_formed(lengths):
    data = data_of(
        counting_corpus(some_lengths(400, 12)), inputs_length=lengths[0], targets_length=lengths[1]
    )
    plan = data.plan(7, 24)
    batch = data.rows(plan, 0, 24)
    assert batch.is_packed
    assert batch.input_ids_BS.shape == (24, lengths[0])
    assert batch.labels_BT.shape == (24, lengths[1])
    real = 0
    for ids, segments, nothing in (
        (batch.input_ids_BS, batch.input_segments_BS, PAD),
        (batch.labels_BT, batch.target_segments_BT, IGNORED_LABEL),
    ):
        assert (ids[segments == 0] == nothing).all()
        assert (ids[segments > 0] > PAD).all()
        real += int((segments > 0).sum())
        for row in segments.tolist():
            used = [segment for segment in row if segment]
            assert used == sorted(used)
            assert set(used) == set(range(1, max(used) + 1))
            assert not any(row[len(used) :])
    assert batch.num_real_tokens == plan.num_real_tokens == real
    assert batch.has_padding == (real < batch.num_positions)


def test_greedy_stops_where_the_next_example_fits_nowhere():
    data = data_of(counting_corpus(some_lengths(500, 25)), inputs_length=32, targets_length=32)
    plan = data.plan(3, 8)
    follower = data.plan(plan.examples_consumed, 1)
    inputs, _, labels = segments_of(data.rows(follower, 0, 1))[0]
    batch = data.rows(plan, 0, 8)
    input_room = 32 - (batch.input_segments_BS > 0).sum(dim=1)
    target_room = 32 - (batch.target_segments_BT > 0).sum(dim=1)
    assert not ((input_room >= len(inputs)) & (target_room >= len(labels))).any()


def test_greedy_uses_the_first_row_that_has_room():
    data = data_of(counting_corpus([5] * 200), inputs_length=32, targets_length=32)
    plan = data.plan(0, 10)
    room = np.full((10, 2), 32)
    layout = plan.layout
    for row, num_inputs, num_targets in zip(
        layout.rows, layout.input_lengths, layout.target_lengths, strict=True
    ):
        fitting = (room >= [num_inputs, num_targets]).all(axis=1)
        assert fitting.argmax() == row
        room[row] -= [num_inputs, num_targets]


def test_greedy_fills_rows_of_short_documents():
    data = data_of(counting_corpus(some_lengths(3000, 20)), inputs_length=128, targets_length=128)
    plan = data.plan(0, 32)
    assert plan.num_real_tokens / (32 * 256) > 0.85
    alone = data_of(counting_corpus([20] * 99), packing="none").plan(0, 32)
    assert alone.num_real_tokens == 32 * 22


def test_targets_are_cut_to_their_length():
    data = data_of(counting_corpus([63]), packing="none", inputs_length=64, targets_length=8)
    for position in range(40):
        plan = data.plan(position, 1)
        (inputs, _, labels), *others = segments_of(data.rows(plan, 0, 1))
        text = list(range(10, 73))
        rest = text[len(inputs) - 1 :]
        assert inputs == [*text[: len(inputs) - 1], EOS]
        assert labels == [*rest[:7], EOS]
        assert not others


def test_a_document_of_one_token_has_an_empty_prefix():
    data = data_of(counting_corpus([1]), packing="none", inputs_length=8, targets_length=8)
    batch = data.rows(data.plan(0, 1), 0, 1)
    assert segments_of(batch) == [([EOS], [PAD, 10], [10, EOS])]
    assert not batch.is_packed


def test_pairs_have_no_padding_and_hold_two_whole_stretches():
    corpus = counting_corpus(some_lengths(400, 30))
    data = data_of(corpus, packing="complementary_pairs", inputs_length=32, targets_length=32)
    num_rows = data.num_examples // 2
    plan = data.plan(0, num_rows)
    batch = data.rows(plan, 0, num_rows)
    assert batch.is_packed
    assert not batch.has_padding
    assert batch.num_real_tokens == plan.num_real_tokens == batch.num_positions
    stretches = [inputs + labels for inputs, _, labels in segments_of(batch)]
    assert len(stretches) == 2 * num_rows
    text = RunningText(corpus, EOS).read(32 * np.arange(data.num_examples), 32)
    left_out = data.num_examples - 2 * num_rows
    missing = [s for s in text.tolist() if s not in stretches]
    assert len(missing) == left_out
    assert sorted(stretches + missing) == sorted(text.tolist())


def test_pairs_are_split_anywhere():
    data = data_of(
        counting_corpus([5000]), packing="complementary_pairs", inputs_length=8, targets_length=8
    )
    batch = data.rows(data.plan(0, 300), 0, 300)
    first_prefixes = (batch.input_segments_BS == 1).sum(dim=1)
    assert set(first_prefixes.tolist()) == set(range(1, 8))
    assert (first_prefixes == (batch.target_segments_BT == 2).sum(dim=1)).all()


@pytest.mark.parametrize("packing", ["none", "greedy", "complementary_pairs"])
def test_any_part_of_a_plan_holds_the_same_rows(packing):
    data = data_of(
        counting_corpus(some_lengths(300, 40)), packing=packing, inputs_length=32, targets_length=32
    )
    plan = data.plan(11, 12)
    whole = data.rows(plan, 0, 12)
    for first, last in ((0, 1), (5, 9), (11, 12)):
        part = data.rows(plan, first, last)
        for name in ("input_ids_BS", "labels_BT", "input_segments_BS", "target_segments_BT"):
            assert getattr(part, name).equal(getattr(whole, name)[first:last])
