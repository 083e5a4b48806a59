"""Pieces of a corpus, found without an array of all of them."""

import numpy as np
import pytest

from softprompt_dist.data.lm import document_index
from softprompt_dist.data.lm.pieces import DocumentPieces, EqualPieces, RunningText
from tests.lm_corpora import EOS, counting_corpus, some_lengths


@pytest.fixture(params=[(2, 3), (4, 1), (256, 4096)], ids=["2", "4", "256"], autouse=True)
def small_blocks(request, monkeypatch):
    per_block, at_a_time = request.param
    monkeypatch.setattr(document_index, "DOCUMENTS_PER_BLOCK", per_block)
    monkeypatch.setattr(document_index, "BLOCKS_AT_A_TIME", at_a_time)


LENGTHS = {
    "one": [5],
    "one token": [1],
    "even": [6, 6, 6],
    "mixed": [1, 17, 2, 3, 9, 40, 1, 1, 5, 6, 7],
    "empty ones": [0, 4, 0, 0, 9, 0],
    "many": some_lengths(1000, 30),
}


@pytest.fixture(params=LENGTHS.values(), ids=LENGTHS.keys())
def lengths(request):
    return request.param


def cut_one_by_one(corpus, piece_length):
    pieces = []
    offsets = corpus.document_offsets.tolist()
    for start, end in zip(offsets, offsets[1:], strict=False):
        pieces += [(i, min(piece_length, end - i)) for i in range(start, end, piece_length)]
    return pieces


@pytest.mark.parametrize("piece_length", [1, 3, 6, 100])
def test_pieces_of_documents(lengths, piece_length):
    corpus = counting_corpus(lengths)
    expected = cut_one_by_one(corpus, piece_length)
    pieces = DocumentPieces(corpus, piece_length)
    assert len(pieces) == len(expected)
    indices = np.random.default_rng(0).integers(0, len(pieces), 50)
    found = zip(*(a.tolist() for a in pieces.stretches(indices)), strict=True)
    assert list(found) == [expected[i] for i in indices]


def test_running_text_from_anywhere(lengths):
    corpus = counting_corpus(lengths)
    text = RunningText(corpus, EOS)
    expected = np.concatenate(
        [[*corpus.tokens(*corpus.offsets(d, d + 1)), EOS] for d in range(corpus.num_documents)]
    )
    assert text.num_tokens == len(expected)
    for length in {1, 2, min(7, len(expected)), len(expected)}:
        starts = np.arange(len(expected) - length + 1)[::-1]
        starts = starts[:: max(1, len(starts) // 60)]
        windows = np.stack([expected[start : start + length] for start in starts])
        np.testing.assert_array_equal(text.read(starts, length), windows)


def test_equal_pieces_drop_what_is_left():
    pieces = EqualPieces(29, 7)
    assert len(pieces) == 4
    starts, lengths = pieces.stretches(np.array([3, 0]))
    assert starts.tolist() == [21, 0]
    assert lengths.tolist() == [7, 7]
