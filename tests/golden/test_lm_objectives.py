"""T5's own span corruption and prefix LM on the same tokens, masks and split points."""

import json
from pathlib import Path

import numpy as np
import pytest

from softprompt_dist.data.corpus import TokenisedCorpus, cut_concatenated, cut_documents
from softprompt_dist.data.lm.objectives import (
    append_eos_after_trim,
    corrupt_spans,
    example_generator,
    random_prefix_length,
    random_spans_helper,
    random_spans_mask,
    split_prefix,
)

DATA = Path(__file__).parent / "data" / "lm"
FIRST_SENTINEL, EOS = 32099, 1


def read_json(name):
    return json.loads((DATA / name).read_text())


def read_lines(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize("case", read_json("random_spans_helper.json"))
def test_lengths_without_padding(case):
    expected = case.pop("tokens_length"), case.pop("targets_length")
    assert random_spans_helper(**case) == expected


def assert_as_recorded(example, case):
    assert example.input_ids.tolist() == case["inputs"]
    assert example.target_ids.tolist() == case["targets"]
    for key, expected in case.items():
        if "_eos_" in key:
            side = example.input_ids if key.startswith("inputs") else example.target_ids
            length = int(key.rsplit("_", 1)[1])
            assert append_eos_after_trim(side, length, EOS).tolist() == expected


@pytest.mark.parametrize("case", read_lines("span_corruption.jsonl"))
def test_span_corruption_of_a_given_mask(case):
    tokens = np.array(case["tokens"])
    mask = np.array([digit == "1" for digit in case["mask"]])
    example = corrupt_spans(tokens, mask, FIRST_SENTINEL)
    assert_as_recorded(example, case)


@pytest.mark.parametrize("case", read_lines("prefix_lm.jsonl"))
def test_prefix_lm_at_a_given_split(case):
    example = split_prefix(np.array(case["tokens"]), case["n_prefix"])
    assert_as_recorded(example, case)


@pytest.mark.parametrize("case", read_json("sentinels_eos.json")["append_eos_after_trim"])
def test_end_of_sequence_after_trim(case):
    for side in ("inputs", "targets"):
        ids = np.array(case[side], dtype=np.int64)
        trimmed = append_eos_after_trim(ids, case["sequence_length"][side], EOS)
        assert trimmed.tolist() == case[f"out_{side}"]


def corpus_of(docs):
    offsets = np.cumsum([0, *map(len, docs)])
    return TokenisedCorpus(np.concatenate([np.array(d, np.int32) for d in docs]), offsets, "")


def test_documents_are_cut_on_their_own_for_prefix_lm():
    case = read_json("chunking.json")
    pieces = cut_documents(corpus_of(case["docs"]), 63)
    assert [piece.tolist() for piece in pieces] == case["prefix_lm_segments_inputs64"]


@pytest.mark.parametrize("inputs_length", [128, 512])
def test_documents_are_joined_for_span_corruption(inputs_length):
    case = read_json("chunking.json")
    corpus = corpus_of(case["docs"])
    num_tokens = random_spans_helper(inputs_length, 0.15, 3.0).num_tokens
    pieces = cut_concatenated(corpus, num_tokens)
    whole = [
        n for n in case[f"span_corruption_segment_lengths_inputs{inputs_length}"] if n == num_tokens
    ]
    assert [len(piece) for piece in pieces] == whole
    joined = np.concatenate(list(pieces))
    assert joined.tolist() == corpus.token_ids[: len(joined)].tolist()


@pytest.mark.parametrize("length", [141, 568, 1137])
def test_random_masks_are_distributed_as_the_original_ones(length):
    expected = read_json("statistics.json")[f"span_len{length}_nd0.15_ms3.0"]
    draws = 1000
    masks = [random_spans_mask(length, 0.15, 3.0, example_generator(7, i)) for i in range(draws)]
    span_lengths, num_spans = [], set()
    for mask in masks:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        span_lengths += (edges[1::2] - edges[::2]).tolist()
        num_spans.add(len(edges) // 2)
    noise = np.array(masks)
    assert {int(n) for n in noise.sum(axis=1)} == set(expected["noise_tokens_unique"])
    assert num_spans == set(expected["n_spans_unique"])
    assert not noise[:, 0].any()
    assert noise[:, -1].all()
    assert np.std(span_lengths) == pytest.approx(expected["span_length_std"], rel=0.05)
    histogram = np.bincount(span_lengths, minlength=13)[1:5] / draws
    original = np.array(expected["span_length_hist_1_to_12"][:4]) / expected["draws"]
    np.testing.assert_allclose(histogram, original, rtol=0.12)
    deciles = [part.mean() for part in np.array_split(noise, 10, axis=1)]
    np.testing.assert_allclose(deciles, expected["noise_prob_by_decile"], atol=0.02)


@pytest.mark.parametrize("length", [511, 10, 3, 2])
def test_random_prefixes_are_distributed_as_the_original_ones(length):
    expected = read_json("statistics.json")[f"prefix_len{length}"]
    draws = [random_prefix_length(length, example_generator(3, i)) for i in range(4000)]
    assert min(draws) == expected["n_prefix_min"]
    assert max(draws) == pytest.approx(expected["n_prefix_max"], abs=length // 100)
    assert np.mean(draws) == pytest.approx(expected["n_prefix_mean"], rel=0.04)
    assert np.std(draws) == pytest.approx(expected["n_prefix_std"], rel=0.04, abs=1e-9)
