"""Random choices by position."""

import numpy as np
import pytest

from softprompt_dist.data.lm.draws import (
    SpanCounts,
    random_prefix_lengths,
    random_spans_masks,
    random_words,
    stream_key,
)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 7), (3, 8), (4, 4), (90, 10), (5, 0)])
def test_words_do_not_depend_on_how_they_are_asked_for(first, count):
    key = stream_key("any", 1)
    whole = random_words(key, 0, 100)
    np.testing.assert_array_equal(random_words(key, first, count), whole[first : first + count])


def test_keys_differ():
    keys = {tuple(stream_key(*parts)) for parts in [("a", 1), ("a", 2), ("b", 1), ("a1",), ()]}
    assert len(keys) == 5


def test_prefixes_belong_to_positions():
    lengths = np.full(300, 40)
    whole = random_prefix_lengths(lengths, 5, 0)
    np.testing.assert_array_equal(random_prefix_lengths(lengths[:50], 5, 123), whole[123:173])
    assert (random_prefix_lengths(lengths, 6, 0) != whole).mean() > 0.9


def test_prefixes_of_short_examples():
    assert random_prefix_lengths(np.array([1, 2, 1, 2]), 0, 0).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("counts", [(2, 1, 1), (3, 1, 1), (10, 5, 5), (10, 2, 1), (568, 85, 28)])
def test_masks_belong_to_positions_and_hold_the_counts(counts):
    counts = SpanCounts(*counts)
    whole = random_spans_masks(counts, 1, 0, 60)
    np.testing.assert_array_equal(random_spans_masks(counts, 1, 17, 9), whole[17:26])
    assert (whole.sum(axis=1) == counts.num_noise).all()
    starts = whole & ~np.pad(whole, ((0, 0), (1, 0)))[:, :-1]
    assert (starts.sum(axis=1) == counts.num_spans).all()


def test_all_masks_are_equally_likely():
    # 6 kept and 3 noise tokens in 2 spans each: 5 x 2 ways.
    masks = random_spans_masks(SpanCounts(9, 3, 2), 3, 0, 10_000)
    _, counts = np.unique(masks, axis=0, return_counts=True)
    assert len(counts) == 10
    assert abs(counts - 1000).max() < 4.5 * np.sqrt(1000)


def test_draws_never_change():
    """Runs are resumed by later versions: these must stay as they are."""
    assert random_prefix_lengths(np.full(6, 512), 1, 1000).tolist() == [388, 460, 328, 22, 60, 345]
    mask = random_spans_masks(SpanCounts(20, 6, 3), 1, 1000, 1)[0]
    assert "".join("01"[int(noise)] for noise in mask) == "00000010000010001111"
