"""Several tasks tuned together: how often each is drawn, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from softprompt_dist.data.order import ExampleOrder
from softprompt_dist.task_config import MixtureConfig

Tasks = npt.NDArray[np.int64]

BLOCK_LENGTH = 4096
"""Positions whose tasks are drawn by one generator. Another value would be another order."""


def mixing_rates(num_examples: Sequence[int], config: MixtureConfig) -> list[float]:
    """Share of the draws that each task gets; they add up to 1.

    Proportional: min(examples, maximum) ** (1 / temperature), T5's `rate_num_examples` (t5.data).

    Args:
        num_examples: training examples of each task, in order.
        config: which rates, and their cap and temperature.
    """
    if config.rates == "equal":
        weights = [1.0 for _ in num_examples]
    else:
        capped = [min(count, config.maximum or count) for count in num_examples]
        weights = [count ** (1.0 / config.temperature) for count in capped]
    total = sum(weights)
    return [weight / total for weight in weights]


class MixtureOrder:
    """Endless draws of (task, example); a pure function of (seed, position).

    Which task a position gets is drawn by the rates, from numpy's Philox generator keyed by the
    seed and the number of the block that the position is in. Within a task, its own `ExampleOrder`
    goes on from draw to draw: all examples once, shuffled, before any comes again. One task alone
    is visited exactly as `ExampleOrder` visits it.

    Raises:
        ValueError: there is no task, a task has no examples, or the rates are not one for each.
    """

    def __init__(self, num_examples: Sequence[int], rates: Sequence[float], seed: int) -> None:
        """Order draws of tasks with so many examples; nothing is drawn yet."""
        if not num_examples or len(num_examples) != len(rates):
            raise ValueError(f"{len(num_examples)} tasks need as many rates, got {len(rates)}.")
        if min(rates) < 0 or not sum(rates) > 0:
            raise ValueError(f"Rates must not be negative and not all zero, got {list(rates)}.")
        sums = np.cumsum(rates)
        self._bounds = sums / sums[-1]
        self._draw_seed = _derived_seed(seed, 0)
        # Seeds of their own: tasks of equally many examples must not be visited alike.
        seeds = [seed, *(_derived_seed(seed, task) for task in range(1, len(rates)))]
        self._orders = [ExampleOrder(*pair) for pair in zip(num_examples, seeds, strict=True)]
        self._counts_before = [np.zeros(len(rates), dtype=np.int64)]
        self._block = lru_cache(maxsize=2)(self._draw_block)

    def pairs(self, start: int, count: int) -> list[tuple[int, int]]:
        """(task, index of its example) at positions [start, start + count).

        Raises:
            ValueError: `start` or `count` is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"Positions must not be negative, got start {start}, count {count}.")
        tasks = self._tasks(start, count)
        earlier = self._counts_up_to(start).tolist()
        coming = {
            task: iter(self._orders[task].indices(earlier[task], times))
            for task, times in Counter(tasks).items()
        }
        return [(task, next(coming[task])) for task in tasks]

    def _tasks(self, start: int, count: int) -> list[int]:
        first, offset = divmod(start, BLOCK_LENGTH)
        blocks = range(first, -(-(start + count) // BLOCK_LENGTH))
        drawn = [task for block in blocks for task in self._block(block).tolist()]
        return drawn[offset : offset + count]

    def _counts_up_to(self, position: int) -> Tasks:
        """How often each task was drawn before `position`."""
        block, offset = divmod(position, BLOCK_LENGTH)
        for earlier in range(len(self._counts_before) - 1, block):
            counted = self._count(self._block(earlier))
            self._counts_before.append(self._counts_before[-1] + counted)
        return self._counts_before[block] + self._count(self._block(block)[:offset])

    def _count(self, tasks: Tasks) -> Tasks:
        return np.bincount(tasks, minlength=len(self._orders))

    def _draw_block(self, number: int) -> Tasks:
        key = np.array([self._draw_seed, number], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        return np.searchsorted(self._bounds, generator.random(BLOCK_LENGTH), side="right")


def _derived_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
