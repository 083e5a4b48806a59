"""A rank's share of one global batch after the other, made ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.plan import BatchPlan
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.errors import ConfigError
from softprompt_dist.section import BatchConfig


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one step."""

    micro_batches: list[RowBatch]
    examples_consumed: int
    """Since the run began, this step's included: what a checkpoint behind it must hold."""
    num_real_tokens: int
    """Of the global batch: positions of both sides, of all ranks, that are not padding."""
    num_positions: int
    """Of the global batch, padding included."""


class BatchStream:
    """Endless steps from `examples_consumed` on; a context manager.

    Micro-batch j of rank r of W is rows [(j * W + r) * m, + m) of the global batch.
    """

    def __init__(  # noqa: PLR0913 - six facts, each the caller's own
        self,
        data: LMData,
        batch: BatchConfig,
        examples_consumed: int,
        rank: int,
        world_size: int,
        num_prefetched: int = 2,
    ) -> None:
        """Start making steps, at most `num_prefetched` ahead.

        Raises:
            ConfigError: the ranks' micro-batches do not make up a global batch.
            DataError: the corpus does not fill one.
        """
        _require_divisible(batch, world_size)
        data.require_rows(batch.global_batch_size)
        self._data, self._batch = data, batch
        self._rank, self._world_size = rank, world_size
        self._closed = threading.Event()
        self._ready: queue.Queue[StepBatches | BaseException] = queue.Queue(max(1, num_prefetched))
        self._thread = threading.Thread(
            target=self._make_ahead, args=(examples_consumed,), name="batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatches]:
        """Itself."""
        return self

    def __next__(self) -> StepBatches:
        """The next step; waits for it where it is not ready.

        Raises:
            Exception: whatever went wrong while it was made.
        """
        if self._closed.is_set():
            raise StopIteration
        step = self._ready.get()
        if isinstance(step, BaseException):
            self.close()
            raise step
        return step

    def __enter__(self) -> BatchStream:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop the thread; may be called twice."""
        self._closed.set()
        # A thread that waits for room must see it, or it would never look at the event.
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)

    def _make_ahead(self, examples_consumed: int) -> None:
        try:
            while not self._closed.is_set():
                plan = self._data.plan(examples_consumed, self._batch.global_batch_size)
                self._ready.put(self._step(plan))
                examples_consumed = plan.examples_consumed
        except BaseException as error:  # raised where the step is asked for
            self._ready.put(error)

    def _step(self, plan: BatchPlan) -> StepBatches:
        size = self._batch.micro_batch_size
        firsts = range(self._rank * size, plan.num_rows, size * self._world_size)
        micro_batches = []
        for first in firsts:
            if self._closed.is_set():
                break
            micro_batches.append(self._data.rows(plan, first, first + size))
        row_length = (self._data.inputs_length or 0) + self._data.targets_length
        return StepBatches(
            micro_batches, plan.examples_consumed, plan.num_real_tokens, plan.num_rows * row_length
        )


def _require_divisible(batch: BatchConfig, world_size: int) -> None:
    together = batch.micro_batch_size * world_size
    if batch.global_batch_size % together:
        raise ConfigError(
            f"batch.global_batch_size is {batch.global_batch_size}, but {world_size} ranks x "
            f"batch.micro_batch_size {batch.micro_batch_size} = {together} must divide it. Use "
            f"{-(-batch.global_batch_size // together) * together}, or another micro_batch_size."
        )
