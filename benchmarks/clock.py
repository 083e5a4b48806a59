"""Where a step's time goes, and what its collectives move; ours and the peer's by the same clock.

Time belongs to the innermost phase that is running: what a gather inside forward blocks counts as
`gather` and not as `forward`.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

PHASES = ("gather", "forward", "backward", "reduce", "optimizer", "rest")
_COLLECTIVES = {
    "all_gather_into_tensor": "gather",
    "all_gather_single": "gather",
    "all_gather": "gather",
    "broadcast": "gather",
    "all_reduce": "reduce",
    "reduce_scatter_tensor": "reduce",
    "reduce_scatter_single": "reduce",
    "reduce_scatter": "reduce",
    "reduce": "reduce",
}
"""Those of torch.distributed that move weights or gradients -> the phase of their time."""


class StepClock:
    """Exclusive seconds per phase and bytes per kind of collective, step by step.

    Make it before DeepSpeed joins the world: DeepSpeed keeps its own references to collectives.

    Attributes:
        steps: of each finished step: seconds (`wall` and the phases), `gather_bytes` and
            `reduce_bytes` (sizes of the results on this rank), `calls`, `flops`.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._running: list[str] = []
        self._since = time.perf_counter()
        self._start = self._since
        self._now: dict[str, float] = defaultdict(float)
        for name, phase in _COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(dist, name, self._collective(getattr(dist, name), phase))
        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]

    def start(self) -> None:
        """Forget what happened since the last step; the next one begins now."""
        self._start = self._since = time.perf_counter()
        self._now.clear()

    def end_step(self) -> None:
        """A step is over, and the next one begins."""
        self._turn()
        self.steps.append({**self._now, "wall": self._since - self._start})
        self._start = self._since
        self._now.clear()

    def add(self, name: str, value: float) -> None:
        """Add to a number of this step, such as `flops`."""
        self._now[name] += value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time in the block is `name`'s, unless an inner phase takes it."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begin a phase."""
        self._turn()
        self._running.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self._turn()
        self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is `name`'s."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return run

    def watch_forward(self, module: torch.nn.Module) -> None:
        """Calls of `module` are phase `forward`."""
        module.register_forward_pre_hook(lambda *_: self.enter("forward"), prepend=True)
        module.register_forward_hook(lambda *_: self.leave())

    def _turn(self) -> None:
        now = time.perf_counter()
        self._now[self._running[-1] if self._running else "rest"] += now - self._since
        self._since = now

    def _collective(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self.add("calls", 1)
            self.add(f"{phase}_bytes", _bytes_of(_result_of(arguments, options)))
            with self.phase(phase):
                work = function(*arguments, **options)
            return work if work is None else _TimedWork(work, self, phase)

        return run


class CpuTime:
    """Seconds that this process computes, whatever else the machine does meanwhile."""

    def __init__(self) -> None:
        self._since = time.process_time()

    def since_last_call(self) -> float:
        """Of all threads, since this was called last or made."""
        before, self._since = self._since, time.process_time()
        return self._since - before


class _TimedWork:
    """A collective under way; waiting for it is time of its phase."""

    def __init__(self, work: Any, clock: StepClock, phase: str) -> None:
        self._work = work
        self._clock = clock
        self._phase = phase

    def wait(self, *arguments: Any) -> Any:
        """Wait for the collective."""
        with self._clock.phase(self._phase):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _result_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The tensor or tensors that a collective fills: its first argument, whatever its name."""
    if arguments:
        return arguments[0]
    names = ("output_tensor", "output", "tensor", "tensor_list", "output_tensors")
    return next(options[name] for name in names if name in options)


def _bytes_of(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.numel() * result.element_size()
    return sum(_bytes_of(part) for part in result)
