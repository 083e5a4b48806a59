"""Random choices of whole batches, each a pure function of (seed, position in the run).

They come from Philox, a generator that can start anywhere in its stream: whoever asks for the
numbers of a position gets the same ones, whatever was drawn before.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]
WordArray = npt.NDArray[np.uint64]

WORDS_PER_COUNTER = 4  # Philox-4x64


class SpanCounts(NamedTuple):
    """How much of one example is noise."""

    num_tokens: int
    """Noise or not."""
    num_noise: int
    """Tokens."""
    num_spans: int
    """Of noise, and as many of kept tokens."""


def stream_key(*parts: int | str) -> WordArray:
    """128 bits that differ wherever `parts` do: [2]."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def random_words(key: WordArray, first: int, count: int) -> WordArray:
    """64-bit words `first` to `first + count` of the stream of `key`."""
    counter, skipped = divmod(first, WORDS_PER_COUNTER)
    words = np.random.Philox(key=key, counter=counter).random_raw(skipped + count)
    return words[skipped:]


def random_prefix_lengths(lengths_E: IdArray, seed: int, first: int) -> IdArray:
    """Prefixes of E examples at positions from `first` on: uniform in [1, length - 1].

    0 where an example has but one token. As T5's `random_prefix_noise_mask`.
    """
    words_E = random_words(stream_key("prefix", seed), first, len(lengths_E))
    uniform_E = (words_E >> np.uint64(11)) * 2.0**-53
    prefixes_E = 1 + (uniform_E * (lengths_E - 1)).astype(np.int64)
    return np.where(lengths_E < 2, 0, prefixes_E)


def random_spans_masks(counts: SpanCounts, seed: int, first: int, count: int) -> MaskArray:
    """True where a token is noise, of `count` examples at positions from `first` on: [count, N].

    Kept and noise spans alternate, a kept one first, noise last; their lengths are uniform over
    all ways to make up the totals. As T5's `random_spans_noise_mask`.
    """
    num_kept = counts.num_tokens - counts.num_noise
    words_each = -(-(counts.num_tokens - 2) // WORDS_PER_COUNTER) * WORDS_PER_COUNTER
    words = random_words(stream_key("spans", seed), first * words_each, count * words_each)
    words_EW = words.reshape(count, words_each)
    kept_EK = _compositions(words_EW[:, : num_kept - 1], counts.num_spans)
    noise_EK = _compositions(words_EW[:, num_kept - 1 : counts.num_tokens - 2], counts.num_spans)
    lengths_EK = np.stack([kept_EK, noise_EK], axis=2).reshape(count, -1)
    edges_EK = np.cumsum(lengths_EK, axis=1)[:, :-1]
    is_edge_EN = np.zeros((count, counts.num_tokens), dtype=np.int8)
    np.put_along_axis(is_edge_EN, edges_EK, 1, axis=1)
    return np.cumsum(is_edge_EN, axis=1, dtype=np.int16) % 2 == 1


def _compositions(words_EW: WordArray, parts: int) -> IdArray:
    """`parts` positive integers of sum W + 1, every choice equally likely: [E, parts]."""
    total = words_EW.shape[1] + 1
    if parts == 1:
        return np.full((len(words_EW), 1), total, dtype=np.int64)
    # The places of the smallest of W random words are a uniform choice of places.
    places = np.argpartition(words_EW, parts - 2, axis=1)[:, : parts - 1]
    cuts = np.sort(places, axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=total)
