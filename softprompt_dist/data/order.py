"""The order in which examples are visited: endless, shuffled, resumable from a position alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ExampleOrder:
    """Epoch after epoch of all examples, each shuffled anew; a pure function of (seed, position).

    Epoch e is a permutation drawn from numpy's Philox generator keyed by (seed, e), so nothing has
    to be saved but the position, and every rank can compute any part of the order by itself.

    Raises:
        ValueError: there are no examples, or the seed does not fit 64 bits.
    """

    def __init__(self, num_examples: int, seed: int) -> None:
        """Order `num_examples` examples; nothing is drawn yet."""
        if num_examples < 1:
            raise ValueError(f"An order needs at least 1 example, got {num_examples}.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"The seed of an order must be in [0, 2**64), got {seed}.")
        self._num_examples = num_examples
        self._seed = seed
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def indices(self, start: int, count: int) -> list[int]:
        """Example indices at positions [start, start + count); positions count examples seen.

        Raises:
            ValueError: `start` or `count` is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"Positions must not be negative, got start {start}, count {count}.")
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, offset = divmod(start + len(chosen), self._num_examples)
            part = self._epoch_permutation(epoch)[offset : offset + count - len(chosen)]
            chosen.extend(part.tolist())
        return chosen

    def _epoch_permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            key = np.array([self._seed, epoch], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            self._permutation = generator.permutation(self._num_examples)
            self._epoch = epoch
        return self._permutation
