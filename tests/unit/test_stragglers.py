from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from softprompt_dist.lifecycle import stragglers
from softprompt_dist.lifecycle.stragglers import Straggler, StragglerMonitor

Judge = Callable[[Sequence[float]], Straggler | None]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """`judge(seconds)`: what ten steps are found to be, in which each rank takes so long alone."""

    def of_ranks(seconds: Sequence[float]) -> Straggler | None:
        hosts = [f"node{rank // 2}" for rank in range(len(seconds))]
        monkeypatch.setattr(stragglers.ranks, "gather_objects", lambda _: hosts)
        monkeypatch.setattr(stragglers.ranks, "world_size", lambda: len(seconds))
        sums = torch.tensor(seconds, dtype=torch.float64)
        monkeypatch.setattr(stragglers.ranks, "all_reduce_sum", lambda _: sums)
        monitor = StragglerMonitor(1.5)
        found = []
        for _ in range(10):
            monitor.begin()
            monitor.arrive()
            assert not monitor.has_compared or not found
            found.append(monitor.end())
        assert monitor.has_compared
        assert found[:9] == [None] * 9
        return found[9]

    return of_ranks


def test_a_slow_rank_is_named_with_its_host_and_ratio(judge: Judge) -> None:
    assert judge([0.25, 0.25, 0.25, 0.75]) == Straggler(3, "node1", 3.0, 0.5)


def test_of_two_ranks_the_slower_one(judge: Judge) -> None:
    assert judge([0.75, 0.25]) == Straggler(0, "node0", 3.0, 0.5)


@pytest.mark.parametrize(
    "seconds",
    [
        [0.1, 0.1, 0.1, 0.14],  # below the ratio
        [0.001, 0.001, 0.001, 0.015],  # fifteen times as long, but of nothing
        [0.3, 0.3],
        [0.1],
    ],
)
def test_what_is_nearly_alike_is_not_named(judge: Judge, seconds: list[float]) -> None:
    assert judge(seconds) is None


def test_the_time_between_beginning_and_arriving_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0] * 10)
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: next(now))
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(
        stragglers.ranks, "all_reduce_sum", lambda tensor: taken.append(tensor) or tensor
    )
    monitor = StragglerMonitor(1.5)
    for _ in range(10):
        monitor.begin()
        monitor.arrive()
        monitor.end()
    assert taken[0].tolist() == [1.0]
