"""How fast an adaptation goes: real tokens per second, model FLOP/s and MFU, time left.

The operations of a row of S encoder and T decoder positions, padding included, for a T5 v1.1 of L
encoder and L decoder layers, model width d, attention width i = heads * d_kv, vocabulary V and
f = 3 d d_ff weights in a feed-forward part:

    forward = 2 L (4 d i + f) S + 4 L S^2 i                          encoder
            + 2 L (6 d i + f) T + 4 d i L S + 4 L T^2 i + 4 L T S i  decoder, with cross-attention
            + 2 V d T                                                head
    train   = 3 forward

Scores of attention count in full, also where a causal or a packed row's mask hides half of them.
What activation checkpointing computes twice counts once. A decoder-only model is the encoder's line
over T positions and the head. `planning.work.training_operations` is this formula for any
architecture we know.
"""

from __future__ import annotations

import time

from softprompt_dist.adaptation.peak import Peak

SHOWN_WHILE_TRAINING = {"loss": ".4g", "tokens_per_second": ",.0f", "mfu": ".1f"}
"""The metrics of an update that a person sees as it runs, and how they are written."""


class Throughput:
    """Counts what all ranks together read in updates, and how long those take.

    Args:
        operations_per_update: floating-point operations of training on a global batch.
        peak: of all ranks' devices together.
    """

    def __init__(self, operations_per_update: float, peak: Peak) -> None:
        self._operations_per_update = operations_per_update
        self._peak = peak
        self._first_end: float | None = None
        self._num_later_updates = 0
        self._forget()

    def count(self, num_real_tokens: int, num_positions: int, seconds: float) -> None:
        """Add an update that has just ended, of all ranks.

        Args:
            num_real_tokens: positions of encoder and decoder that were not padding.
            num_positions: all of them.
            seconds: until the device was done.
        """
        self._num_updates += 1
        self._real_tokens += num_real_tokens
        self._positions += num_positions
        self._seconds += seconds
        if self._first_end is None:
            self._first_end = time.monotonic()
        else:
            self._num_later_updates += 1

    def read(self, updates_left: int) -> dict[str, float]:
        """What was counted since the last call; at least one update must have been.

        Args:
            updates_left: until the end of the run.

        Returns:
            `tokens_per_second`: that are not padding, of encoder and decoder; `padding`: percent of
            all positions; `tflops_per_second`: of the model, all ranks together; `mfu`: percent of
            the peak; `seconds_left`, from the second update of this attempt on.
        """
        speed = self._num_updates * self._operations_per_update / self._seconds
        metrics = {
            "tokens_per_second": self._real_tokens / self._seconds,
            "padding": 100.0 * (1.0 - self._real_tokens / self._positions),
            "tflops_per_second": speed / 1e12,
            "mfu": 100.0 * speed / self._peak.operations_per_second,
        }
        if self._num_later_updates and self._first_end is not None:
            # By the clock, so that validation and checkpoints count; the first update, which may
            # compile and fill caches, does not.
            per_update = (time.monotonic() - self._first_end) / self._num_later_updates
            metrics["seconds_left"] = updates_left * per_update
        self._forget()
        return metrics

    def _forget(self) -> None:
        self._num_updates = self._real_tokens = self._positions = 0
        self._seconds = 0.0
