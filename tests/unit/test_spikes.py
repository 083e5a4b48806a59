from __future__ import annotations

import pytest
import torch

from softprompt_dist.lifecycle.spikes import LossMonitor


def noise(count: int, seed: int = 0) -> list[float]:
    """Losses of mean 2 and standard deviation 0.1."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = (drawn - drawn.mean()) / drawn.std(correction=0)
    return (2 + 0.1 * drawn).tolist()


@pytest.mark.drill("D15")
def test_ten_sigma_is_flagged_and_five_is_not() -> None:
    monitor = LossMonitor(128, 6.0, noise(128))
    assert monitor.observe(3.0) == pytest.approx(10.0)
    assert monitor.observe(2.5) is None
    assert LossMonitor(128, 4.0, noise(128)).observe(2.5) == pytest.approx(5.0)


def test_a_spike_does_not_hide_the_next_one() -> None:
    monitor = LossMonitor(128, 6.0, noise(128))
    assert [monitor.observe(3.0) for _ in range(3)] == [pytest.approx(10.0)] * 3


def test_a_low_loss_is_no_spike() -> None:
    assert LossMonitor(128, 6.0, noise(128)).observe(0.5) is None


def test_too_few_losses_say_nothing() -> None:
    monitor = LossMonitor(128, 6.0, noise(15))
    assert monitor.observe(100.0) is None


def test_losses_that_do_not_differ_say_nothing() -> None:
    assert LossMonitor(128, 6.0, [2.0] * 50).observe(2.1) is None


def test_only_the_window_counts() -> None:
    monitor = LossMonitor(16, 6.0, [9.0, *noise(16)])
    assert monitor.observe(3.0) == pytest.approx(10.0)


@pytest.mark.drill("D15")
def test_a_resumed_run_judges_as_one_that_was_not_interrupted() -> None:
    losses = noise(300)
    losses[150] = losses[280] = 3.5
    whole = LossMonitor(32, 6.0)
    expected = [whole.observe(loss) for loss in losses]
    resumed = LossMonitor(32, 6.0, losses[136:200])
    assert [resumed.observe(loss) for loss in losses[200:]] == expected[200:]
    assert [step for step, sigmas in enumerate(expected) if sigmas] == [150, 280]
