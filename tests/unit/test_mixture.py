"""Tasks are drawn by their rates, and each is visited epoch by epoch, from any position alike."""

import math
from collections import Counter

import pytest

from softprompt_dist.data import mixture
from softprompt_dist.data.mixture import MixtureOrder, mixing_rates
from softprompt_dist.data.order import ExampleOrder
from softprompt_dist.task_config import MixtureConfig, TaskConfig

# BoolQ, CB, COPA, MultiRC, ReCoRD, RTE, WiC, WSC: the weights of the paper's SuperGLUE mixture.
SUPERGLUE = [9427, 250, 400, 27243, 138854, 2490, 5428, 259]
RATES = [0.5, 0.3, 0.2]
SIZES = [50, 7, 20]
OTHERS = [TaskConfig(name="another")]
"""Rates are refused where nothing is mixed; the sizes come from elsewhere."""


def test_superglue_is_mixed_by_its_sizes():
    rates = mixing_rates(SUPERGLUE, MixtureConfig())
    assert rates == [size / 184351 for size in SUPERGLUE]
    assert sum(rates) == pytest.approx(1.0, abs=1e-15)


def test_no_task_counts_more_than_the_maximum():
    rates = mixing_rates(SUPERGLUE, MixtureConfig(tasks=OTHERS, maximum=10000))
    total = 9427 + 250 + 400 + 10000 + 10000 + 2490 + 5428 + 259
    assert rates == [min(size, 10000) / total for size in SUPERGLUE]


def test_temperature_evens_out_after_the_maximum():
    rates = mixing_rates(
        [100, 400, 90000], MixtureConfig(tasks=OTHERS, maximum=900, temperature=2.0)
    )
    assert rates == pytest.approx([10 / 60, 20 / 60, 30 / 60], rel=1e-12)


def test_equal_rates_ignore_sizes():
    assert mixing_rates([1, 10, 100, 5], MixtureConfig(tasks=OTHERS, rates="equal")) == [0.25] * 4


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_one_task_is_visited_as_without_a_mixture(seed):
    pairs = MixtureOrder([13], [1.0], seed).pairs(5, 60)
    assert pairs == [(0, index) for index in ExampleOrder(13, seed).indices(5, 60)]


def test_tasks_are_drawn_with_their_rates():
    num_draws = 20000
    drawn = Counter(task for task, _ in MixtureOrder(SIZES, RATES, 3).pairs(0, num_draws))
    for task, rate in enumerate(RATES):
        deviation = math.sqrt(rate * (1 - rate) / num_draws)
        assert abs(drawn[task] / num_draws - rate) < 4 * deviation


def test_no_example_of_a_task_comes_twice_in_its_epoch():
    pairs = MixtureOrder(SIZES, RATES, 3).pairs(0, 9000)
    for task, size in enumerate(SIZES):
        indices = [index for drawn, index in pairs if drawn == task]
        for start in range(0, len(indices) - size, size):
            assert sorted(indices[start : start + size]) == list(range(size))


@pytest.mark.parametrize("chunk", [1, 32, 1000, 5000])
def test_any_position_gives_the_same_pair_however_it_is_reached(chunk):
    end = 2 * mixture.BLOCK_LENGTH + 700
    whole = MixtureOrder(SIZES, RATES, 1).pairs(0, end)
    first = end - 3000 if chunk == 1 else 0
    stepped = MixtureOrder(SIZES, RATES, 1)
    pieces = [stepped.pairs(start, chunk) for start in range(first, end, chunk)]
    assert [pair for piece in pieces for pair in piece][: end - first] == whole[first:]
    assert MixtureOrder(SIZES, RATES, 1).pairs(end - 50, 50) == whole[end - 50 :]
    assert stepped.pairs(17, 40) == whole[17:57]  # backwards, too
    assert stepped.pairs(17, 0) == []


def test_tasks_of_one_size_are_not_visited_alike():
    pairs = MixtureOrder([40, 40], [0.5, 0.5], 0).pairs(0, 200)
    first, second = ([index for task, index in pairs if task == which] for which in (0, 1))
    assert first[:40] != second[:40]


def test_seeds_differ():
    assert MixtureOrder(SIZES, RATES, 0).pairs(0, 50) != MixtureOrder(SIZES, RATES, 1).pairs(0, 50)


def test_the_order_is_pinned_so_that_old_checkpoints_resume_the_same_way():
    pairs = MixtureOrder([5, 3], [0.6, 0.4], 42).pairs(4094, 8)
    assert pairs == [(0, 3), (0, 2), (0, 4), (0, 0), (1, 2), (0, 1), (0, 4), (0, 0)]


def test_a_task_without_a_rate_never_comes():
    pairs = MixtureOrder([3, 3, 3], [0.5, 0.5, 0.0], 0).pairs(0, 5000)
    assert {task for task, _ in pairs} == {0, 1}


@pytest.mark.parametrize(
    ("sizes", "rates"), [([], []), ([3], [0.5, 0.5]), ([3, 0], [0.5, 0.5]), ([3], [0.0])]
)
def test_impossible_mixtures_are_refused(sizes, rates):
    with pytest.raises(ValueError, match=r"tasks need|at least 1 example|not all zero"):
        MixtureOrder(sizes, rates, 0)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="negative"):
        MixtureOrder([5], [1.0], 0).pairs(-1, 2)
