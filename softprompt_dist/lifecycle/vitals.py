"""What is watched in every step: progress, the loss, and the rank that the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.lifecycle.spikes import SPIKE, LossMonitor
from softprompt_dist.lifecycle.stragglers import Straggler, StragglerMonitor


class Vitals:
    """All ranks make one for a loop; `say` tells people, on rank 0.

    `losses` are the latest of the attempts before, `spikes` the steps of those that were flagged.
    """

    def __init__(
        self,
        attempt: Attempt,
        say: Callable[[str], None],
        losses: Iterable[float] = (),
        spikes: Sequence[int] = (),
    ) -> None:
        health = attempt.health
        self._attempt, self._say = attempt, say
        self._losses = LossMonitor(health.spike_window, health.spike_sigmas, losses)
        self._stragglers = StragglerMonitor(health.straggler_ratio)
        self._named: tuple[int, str] | None = None
        self._is_spiking = False
        self._since = time.monotonic()
        self._steps = self._num_spikes = 0
        self._note_spikes(len(spikes), spikes[-1] if spikes else None)

    @property
    def step_limit_seconds(self) -> float:
        """How long this rank may be silent: in the first step much is done for the first time."""
        health = self._attempt.health
        return health.step_timeout_seconds if self._steps else health.slow_timeout_seconds

    def begin_step(self) -> None:
        """This rank begins a step."""
        self._since = time.monotonic()
        self._stragglers.begin()

    def arrive(self) -> None:
        """This rank has done its own part of the step."""
        self._stragglers.arrive()

    def end_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """All ranks: note a step; what it adds to the metrics."""
        self._steps += 1
        speed = metrics["num_tokens"] / max(time.monotonic() - self._since, 1e-9)
        self._attempt.note(step=step, loss=metrics["loss"], tokens_per_second=round(speed, 1))
        added = {}
        sigmas = self._losses.observe(metrics["loss"])
        if sigmas is not None:
            added[SPIKE] = sigmas
            self._note_spikes(self._num_spikes + 1, step)
            if not self._is_spiking:  # once, where the loss stays there
                self._say(
                    f"Step {step}: the loss, {metrics['loss']:.4f}, is {sigmas:.1f} standard "
                    "deviations above the latest ones."
                )
        self._is_spiking = sigmas is not None
        straggler = self._stragglers.end()
        if straggler is not None:
            self._name(straggler)
        elif self._named and self._stragglers.has_compared:
            self._named = None
            self._attempt.note(straggler=None)
        return added

    def _note_spikes(self, count: int, last_step: int | None) -> None:
        # For `softprompt status`, which would have to read all metrics to count them.
        self._num_spikes = count
        self._attempt.note(loss_spikes=count, last_loss_spike_step=last_step)

    def _name(self, straggler: Straggler) -> None:
        who = (straggler.rank, straggler.host)
        self._attempt.note(straggler=f"rank {who[0]} on {who[1]}, {straggler.ratio:.1f} x")
        if who != self._named:  # once, not every ten steps
            self._named = who
            self._say(
                f"Rank {straggler.rank} on {straggler.host} takes {straggler.ratio:.1f} times as "
                f"long as the others, {straggler.seconds:.2f} s more in each step."
            )
