"""Checkpoints that are written while training goes on.

The main threads of all ranks copy the state to their hosts' memory and train on; a thread of each
rank then walks through the collectives of the save in a group of its own. Until a checkpoint is
published it does not exist, so a run may be killed at any moment of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.parallel import ranks

_WORTH_TELLING_SECONDS = 0.1
"""Of waiting for the checkpoint before."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds, as this rank has it."""

    step: int
    tensors: Mapping[str, ShardedTensor]
    small: Mapping[str, Tensor]
    """Whole and equal on every rank."""
    values: Mapping[str, Any]
    random_state: Mapping[str, Tensor]


class HostCopy:
    """Memory of the host for a copy of a run's state; the first copy makes it, and it is kept."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def of(self, state: RunState) -> RunState:
        """A copy that further updates do not reach; it lasts until the next one is made."""
        tensors = {name: self._copied(name, state.tensors[name]) for name in state.tensors}
        small = {}
        if ranks.is_main():  # who writes them
            small = {n: t.detach().to("cpu", copy=True) for n, t in state.small.items()}
        return replace(state, tensors=tensors, small=small)

    def _copied(self, name: str, tensor: ShardedTensor) -> ShardedTensor:
        if tensor.is_replicated and not ranks.is_main():
            return replace(tensor, pieces=())  # rank 0 writes its own
        pieces = []
        for number, piece in enumerate(tensor.pieces):
            key, size = (name, number), piece.values.shape
            if key not in self._buffers:
                self._buffers[key] = torch.empty(size, dtype=piece.values.dtype)
            pieces.append(Piece(piece.first, self._buffers[key].copy_(piece.values)))
        return replace(tensor, pieces=tuple(pieces))


class CheckpointSaver:
    """All ranks make one for a loop and use it alike; as a context manager it leaves nothing open.

    Args:
        store: where checkpoints go.
        in_background: whether `save` returns before they are there.
        say: tells people, on rank 0.
        limit_seconds: how long the disk may take.
    """

    def __init__(
        self,
        store: AdaptationCheckpointStore,
        *,
        in_background: bool,
        say: Callable[[str], None],
        limit_seconds: float,
    ) -> None:
        self._store, self._in_background = store, in_background
        self._say, self._limit_seconds = say, limit_seconds
        self._memory = HostCopy()
        self._group = ranks.new_cpu_group() if in_background else None
        self._writer: _Writer | None = None
        self._has_told = False

    def __enter__(self) -> CheckpointSaver:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is being written, whatever happened: it is whole, and may be the last."""
        if kind is None:
            self.wait()
            ranks.leave_group(self._group)
            return
        with suppress(Exception):  # `error` came first
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that what was being written failed: then all must `wait`."""
        return self._writer is not None and self._writer.error is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is at it still."""
        return self._writer is not None and self._writer.is_alive

    def save(self, state: RunState) -> None:
        """All ranks: publish a checkpoint, here and now or in the background.

        One at a time: where the one before is still being written, wait for it.

        Raises:
            SoftpromptError: on all ranks; what the one before, or this one, has met.
        """
        if not self._in_background:
            self.save_now(state)
            return
        self._wait_for_the_one_before(state.step)
        with doing(f"copying step {state.step} to save it", self._limit_seconds):
            copy = self._memory.of(state)
        self._writer = _Writer(state.step, lambda: self._publish_beside(copy))

    def save_now(self, state: RunState) -> None:
        """All ranks: publish a checkpoint, and return when it is on the disk.

        Raises:
            SoftpromptError: as `save`.
        """
        self.wait()
        with doing(f"saving step {state.step}", self._limit_seconds):
            self._publish(state)

    def wait(self) -> None:
        """All ranks: until nothing is being written.

        Raises:
            SoftpromptError: on all ranks; what kept a checkpoint from being published.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            with doing(f"waiting until step {writer.step} is on the disk", self._limit_seconds):
                writer.join()

    def _wait_for_the_one_before(self, step: int) -> None:
        before, started = self._writer, time.monotonic()
        self.wait()
        seconds = time.monotonic() - started
        if before is not None and seconds >= _WORTH_TELLING_SECONDS and not self._has_told:
            self._has_told = True
            self._say(
                f"Training waited {seconds:.1f} s at step {step} until the checkpoint of step "
                f"{before.step} was on the disk. Raise checkpoint.every_steps, or write to a "
                "faster disk. (This is said once.)"
            )

    def _publish_beside(self, state: RunState) -> None:
        with ranks.within(self._group):
            self._publish(state)

    def _publish(self, state: RunState) -> None:
        self._store.save(state.step, state.tensors, state.small, state.values, state.random_state)


class _Writer:
    """A thread that publishes the checkpoint of a step."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step = step
        self.error: BaseException | None = None
        self._work = work
        # A daemon: where the process must end at once, what is not published does not exist.
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for its end; raise what it has met."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised in the main thread
            self.error = error
