from __future__ import annotations

from collections.abc import Iterator

import pytest

from softprompt_dist.lifecycle import vitals as module
from softprompt_dist.lifecycle.stragglers import Straggler
from softprompt_dist.lifecycle.vitals import Vitals
from softprompt_dist.section import HealthConfig


class FakeAttempt:
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.health = HealthConfig(step_timeout_seconds=3, slow_timeout_seconds=70, spike_window=16)
        self.noted: dict[str, object] = {}

    def note(self, **values: object) -> None:
        self.noted |= values


@pytest.fixture
def attempt() -> FakeAttempt:
    return FakeAttempt()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Straggler | None]:
    """What is found at each comparison, which every step is here."""
    coming: list[Straggler | None] = []

    class Monitor:
        has_compared = True

        def __init__(self, ratio: float) -> None: ...
        def begin(self) -> None: ...
        def arrive(self) -> None: ...
        def end(self) -> Straggler | None:
            return coming.pop(0) if coming else None

    monkeypatch.setattr(module, "StragglerMonitor", Monitor)
    return coming


@pytest.fixture
def vitals(
    attempt: FakeAttempt, said: list[str], found: list[Straggler | None]
) -> Iterator[Vitals]:
    return Vitals(attempt, said.append, [2.0 + 0.1 * (-1) ** step for step in range(32)])  # type: ignore[arg-type,return-value]


def test_the_heart_hears_of_each_step(
    vitals: Vitals, attempt: FakeAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([10.0, 10.5])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    attempt.noted.clear()
    vitals.begin_step()
    assert vitals.end_step(7, {"loss": 2.0, "num_tokens": 100}) == {}
    assert attempt.noted == {"step": 7, "loss": 2.0, "tokens_per_second": 200.0}


def test_the_first_step_may_take_longer(vitals: Vitals) -> None:
    assert vitals.step_limit_seconds == 70
    vitals.begin_step()
    vitals.end_step(1, {"loss": 2.0, "num_tokens": 1})
    assert vitals.step_limit_seconds == 3


def test_a_spike_is_kept_each_time_and_said_once(vitals: Vitals, said: list[str]) -> None:
    for step, loss in enumerate([3.0, 3.0, 2.0, 3.0], start=40):
        vitals.begin_step()
        added = vitals.end_step(step, {"loss": loss, "num_tokens": 1})
        assert ("loss_spike_sigmas" in added) == (loss == 3.0)
    assert [sentence.split(":")[0] for sentence in said] == ["Step 40", "Step 43"]
    assert "10.0 standard deviations" in said[0]


def test_a_straggler_is_said_once_and_forgotten_when_it_is_none(
    vitals: Vitals, attempt: FakeAttempt, said: list[str], found: list[Straggler | None]
) -> None:
    slow = Straggler(3, "node1", 2.5, 0.4)
    found += [slow, slow, None, slow]
    noted = []
    for step in range(4):
        vitals.begin_step()
        vitals.end_step(step, {"loss": 2.0, "num_tokens": 1})
        noted.append(attempt.noted.get("straggler"))
    assert noted == ["rank 3 on node1, 2.5 x", "rank 3 on node1, 2.5 x", None] + noted[:1]
    assert len(said) == 2
    assert "Rank 3 on node1 takes 2.5 times as long as the others, 0.40 s more" in said[0]


def test_spikes_of_all_attempts_are_counted(attempt: FakeAttempt, said: list[str]) -> None:
    usual = [2.0 + 0.1 * (-1) ** step for step in range(32)]
    vitals = Vitals(attempt, said.append, usual, [3, 9])  # type: ignore[arg-type]
    assert (attempt.noted["loss_spikes"], attempt.noted["last_loss_spike_step"]) == (2, 9)
    for step, loss in ((40, 2.0), (41, 9.0), (42, 9.0)):
        vitals.begin_step()
        vitals.end_step(step, {"loss": loss, "num_tokens": 1})
    assert (attempt.noted["loss_spikes"], attempt.noted["last_loss_spike_step"]) == (4, 42)
