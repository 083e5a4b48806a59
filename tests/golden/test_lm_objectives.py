"""T5's own span corruption and prefix LM on the same tokens, masks and split points."""

import json
from pathlib import Path

import numpy as np
import pytest

from softprompt_dist.data.lm import prefix_lm, span_corruption
from softprompt_dist.data.lm.draws import random_prefix_lengths, random_spans_masks
from softprompt_dist.data.lm.objectives import corrupt_spans, random_spans_helper
from softprompt_dist.data.lm.pieces import DocumentPieces, EqualPieces, RunningText
from softprompt_dist.data.lm.span_corruption import span_counts
from softprompt_dist.data.lm.special_ids import SpecialIds
from tests.lm_corpora import config_of, corpus_of

DATA = Path(__file__).parent / "data" / "lm"
FIRST_SENTINEL, EOS, PAD = 32099, 1, 0
SPECIAL = SpecialIds(PAD, EOS, FIRST_SENTINEL, 100)


def read_json(name):
    return json.loads((DATA / name).read_text())


def read_lines(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize("case", read_json("random_spans_helper.json"))
def test_lengths_without_padding(case):
    expected = case.pop("tokens_length"), case.pop("targets_length")
    assert random_spans_helper(**case) == expected


@pytest.mark.parametrize("case", read_lines("span_corruption.jsonl"))
def test_span_corruption_of_a_given_mask(case):
    tokens = np.array(case["tokens"])
    mask = np.array([digit == "1" for digit in case["mask"]])
    example = corrupt_spans(tokens, mask, FIRST_SENTINEL)
    assert example.input_ids.tolist() == case["inputs"]
    assert example.target_ids.tolist() == case["targets"]


class RecordedTokenizer:
    """Pieces and ids of T5's vocabulary, as far as they are special."""

    def __init__(self, case):
        self.pad_token_id, self.eos_token_id = case["pad_id"], case["eos_id"]
        self._ids = case["extra_ids"]

    def get_vocab(self):
        return {f"<extra_id_{k}>": token_id for k, token_id in enumerate(self._ids)}


def test_special_ids_of_t5():
    case = read_json("sentinels_eos.json")
    special = SpecialIds.of(RecordedTokenizer(case), "span_corruption")
    assert special == SpecialIds(
        case["pad_id"], case["eos_id"], case["sentinel_id"], len(case["extra_ids"])
    )


def test_sentinels_count_down_as_those_of_t5():
    case = read_json("sentinels_eos.json")
    tokens, mask = np.full(200, 5), np.tile([False, True], 100)
    inputs, targets = corrupt_spans(tokens, mask, case["sentinel_id"])
    assert inputs[1::2].tolist() == case["extra_ids"]
    assert targets[::2].tolist() == case["extra_ids"]


def test_documents_are_cut_on_their_own_for_prefix_lm():
    case = read_json("chunking.json")
    corpus = corpus_of(case["docs"])
    pieces = DocumentPieces(corpus, 63)
    stretches = zip(*pieces.stretches(np.arange(len(pieces))), strict=True)
    cut = [corpus.tokens(start, start + length).tolist() for start, length in stretches]
    assert cut == case["prefix_lm_segments_inputs64"]


@pytest.mark.parametrize("inputs_length", [128, 512])
def test_documents_are_joined_for_span_corruption(inputs_length):
    case = read_json("chunking.json")
    corpus = corpus_of(case["docs"])
    num_tokens = random_spans_helper(inputs_length, 0.15, 3.0).num_tokens
    pieces = EqualPieces(corpus.num_tokens, num_tokens)
    starts, lengths = pieces.stretches(np.arange(len(pieces)))
    recorded = case[f"span_corruption_segment_lengths_inputs{inputs_length}"]
    assert lengths.tolist() == [length for length in recorded if length == num_tokens]
    assert starts.tolist() == [number * num_tokens for number in range(len(pieces))]


def test_running_text_ends_each_document():
    case = read_json("chunking.json")
    text = RunningText(corpus_of([doc for doc in case["docs"] if doc]), EOS)
    *whole, last = case["full_lm_targets100"]
    pieces = EqualPieces(text.num_tokens, 100)
    starts = pieces.stretches(np.arange(len(pieces))).starts
    assert text.read(starts, 100).tolist() == whole
    assert text.read(np.array([100 * len(whole)]), len(last)).tolist() == [last]
    assert text.num_tokens == 100 * len(whole) + len(last)


REGISTERED = read_lines("registered_tasks.jsonl")


def tokens_of_registered_texts():
    """Documents of up to 512 tokens, put together from examples that hold all of their tokens."""
    case = next(c for c in REGISTERED if c["sequence_length"] == {"inputs": 512, "targets": 512})
    documents, goes_on = [], False
    for example in case["examples"]:
        piece = example["inputs"][:-1] + example["targets"][:-1]
        documents[len(documents) - goes_on :] = [documents[-1] + piece] if goes_on else [piece]
        goes_on = len(piece) == 511
    return documents


def row_sides(batch, row):
    """Inputs and targets of an example that has the row to itself."""
    inputs = batch.input_ids_BS[row][batch.input_segments_BS[row] == 1]
    targets = batch.labels_BT[row][batch.target_segments_BT[row] == 1]
    return {"inputs": inputs.tolist(), "targets": targets.tolist()}


class Given:
    """An order and a key for random choices that are given anyway."""

    seed = 0

    def indices(self, first, count):
        return np.arange(first, first + count)


@pytest.mark.parametrize("targets_length", [512, 16])
@pytest.mark.parametrize("case", read_lines("prefix_lm.jsonl"))
def test_prefix_lm_at_a_given_split(case, targets_length, monkeypatch):
    monkeypatch.setattr(prefix_lm, "random_prefix_lengths", lambda *_: np.array([case["n_prefix"]]))
    corpus = corpus_of([case["tokens"]])
    objective = prefix_lm.PrefixLM(corpus, SPECIAL, 512, targets_length, greedy=False)
    batch = objective.rows(objective.plan(Given(), 0, 1), 0, 1)
    assert row_sides(batch, 0) == {
        "inputs": case["inputs_eos_512"],
        "targets": case[f"targets_eos_{targets_length}"],
    }


@pytest.mark.parametrize("case", [c for c in REGISTERED if c["task"] == "c4_v220_prefix_lm"])
def test_registered_prefix_lm(case, monkeypatch):
    splits = np.array([len(example["inputs"]) - 1 for example in case["examples"]])
    monkeypatch.setattr(prefix_lm, "random_prefix_lengths", lambda *_: splits)
    lengths = case["sequence_length"]["inputs"], case["sequence_length"]["targets"]
    corpus = corpus_of(tokens_of_registered_texts())
    objective = prefix_lm.PrefixLM(corpus, SPECIAL, *lengths, greedy=False)
    assert objective.num_examples == len(splits)
    batch = objective.rows(objective.plan(Given(), 0, len(splits)), 0, len(splits))
    assert [row_sides(batch, row) for row in range(len(splits))] == case["examples"]


def noise_mask(example):
    """The mask by which T5 made these inputs and targets."""
    spans, targets = {}, example["targets"][:-1]
    for token in targets:
        if token >= 32000:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    kept_or_noise = [
        [True] * len(spans[token]) if token in spans else [False]
        for token in example["inputs"][:-1]
    ]
    return np.concatenate(kept_or_noise)


@pytest.mark.parametrize("case", [c for c in REGISTERED if c["task"] == "c4_v220_span_corruption"])
def test_registered_span_corruption(case, monkeypatch):
    # The last, incomplete stretch of text makes no row.
    *whole, _ = case["examples"]
    masks = np.stack([noise_mask(example) for example in whole])
    monkeypatch.setattr(span_corruption, "random_spans_masks", lambda *_: masks)
    lengths = case["sequence_length"]
    config = config_of(
        objective="span_corruption",
        inputs_length=lengths["inputs"],
        targets_length=lengths["targets"],
    )
    corpus = corpus_of(tokens_of_registered_texts())
    objective = span_corruption.SpanCorruption(corpus, SPECIAL, config)
    assert objective.num_examples == len(whole)
    batch = objective.rows(objective.plan(Given(), 0, len(whole)), 0, len(whole))
    assert [row_sides(batch, row) for row in range(len(whole))] == whole


@pytest.mark.parametrize("length", [141, 568, 1137])
def test_random_masks_are_distributed_as_the_original_ones(length):
    expected = read_json("statistics.json")[f"span_len{length}_nd0.15_ms3.0"]
    draws = expected["draws"]
    noise = random_spans_masks(span_counts(length, 0.15, 3.0), 7, 0, draws)
    span_lengths, num_spans = [], set()
    for mask in noise:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        span_lengths += (edges[1::2] - edges[::2]).tolist()
        num_spans.add(len(edges) // 2)
    assert {int(n) for n in noise.sum(axis=1)} == set(expected["noise_tokens_unique"])
    assert num_spans == set(expected["n_spans_unique"])
    assert not noise[:, 0].any()
    assert noise[:, -1].all()
    assert np.std(span_lengths) == pytest.approx(expected["span_length_std"], rel=0.04)
    histogram = np.bincount(span_lengths, minlength=13)[1:5] / draws
    original = np.array(expected["span_length_hist_1_to_12"][:4]) / draws
    np.testing.assert_allclose(histogram, original, rtol=0.07)
    deciles = [part.mean() for part in np.array_split(noise, 10, axis=1)]
    np.testing.assert_allclose(deciles, expected["noise_prob_by_decile"], atol=0.012)


@pytest.mark.parametrize("length", [511, 10, 3, 2])
def test_random_prefixes_are_distributed_as_the_original_ones(length):
    expected = read_json("statistics.json")[f"prefix_len{length}"]
    draws = random_prefix_lengths(np.full(2000, length), 3, 0)
    assert draws.min() == expected["n_prefix_min"]
    assert draws.max() == pytest.approx(expected["n_prefix_max"], abs=length // 100)
    assert draws.mean() == pytest.approx(expected["n_prefix_mean"], rel=0.04)
    assert draws.std() == pytest.approx(expected["n_prefix_std"], rel=0.04, abs=1e-9)
    shares = np.bincount(draws, minlength=length)[1:length] / len(draws)
    assert np.abs(shares - 1 / (length - 1)).max() < 4.5 * np.sqrt(1 / (length - 1) / len(draws))
