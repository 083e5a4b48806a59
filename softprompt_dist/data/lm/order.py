"""The order in which examples are visited, without an array of them.

Epoch e visits all n examples in the order of a keyed permutation, computed where it is asked for:
a Feistel network over the next power of four, whose outputs of n and more are sent through again
until they are below n (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite
domains").
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from softprompt_dist.data.lm.draws import IdArray, WordArray, stream_key

NUM_ROUNDS = 8
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Order(Protocol):
    """Which example is visited when."""

    @property
    def seed(self) -> int:
        """Key of all random choices that go with the positions."""

    def indices(self, first: int, count: int) -> IdArray:
        """Examples at positions [first, first + count)."""


class GlobalOrder:
    """Endless: epoch after epoch of all examples, each shuffled anew.

    A pure function of (seed, fingerprint, position) with a few bytes of memory for any number of
    examples, so the position is all that a resume needs.

    Raises:
        ValueError: there are no examples, or more than 2**62.
    """

    def __init__(self, num_examples: int, seed: int, fingerprint: str) -> None:
        """Order `num_examples` examples of the corpus of this fingerprint."""
        if not 1 <= num_examples <= 2**62:
            raise ValueError(f"An order needs 1 to 2**62 examples, got {num_examples}.")
        self.seed = seed
        self._num_examples = num_examples
        self._half_bits = np.uint64(max(1, -(-(num_examples - 1).bit_length() // 2)))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._key = stream_key("order", seed, fingerprint)[:1]

    def indices(self, first: int, count: int) -> IdArray:
        """Examples at positions [first, first + count).

        Raises:
            ValueError: `first` or `count` is negative.
        """
        if first < 0 or count < 0:
            raise ValueError(f"Positions must not be negative, got first {first}, count {count}.")
        epochs_E, offsets_E = np.divmod(np.arange(first, first + count), self._num_examples)
        keys_E = _mixed(self._key + epochs_E.astype(np.uint64) * GOLDEN_GAMMA)
        rounds_R1 = np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None]
        keys_RE = _mixed(keys_E + rounds_R1 * GOLDEN_GAMMA)
        values_E = self._permuted(offsets_E.astype(np.uint64), keys_RE)
        while len(outside := np.flatnonzero(values_E >= np.uint64(self._num_examples))):
            values_E[outside] = self._permuted(values_E[outside], keys_RE[:, outside])
        return values_E.astype(np.int64)

    def _permuted(self, values_E: WordArray, keys_RE: WordArray) -> WordArray:
        left_E, right_E = values_E >> self._half_bits, values_E & self._half_mask
        for keys_E in keys_RE:
            left_E, right_E = right_E, left_E ^ (_mixed(right_E ^ keys_E) & self._half_mask)
        return (left_E << self._half_bits) | right_E


class AsTheyCome:
    """Every example once, in the order of the corpus, with the same random choices in every run."""

    seed = 0

    def indices(self, first: int, count: int) -> IdArray:
        """Examples [first, first + count)."""
        return np.arange(first, first + count, dtype=np.int64)


def _mixed(words: WordArray) -> WordArray:
    """Each word's bits depend on all bits of the input: the finaliser of SplitMix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
