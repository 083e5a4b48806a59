"""The order of examples: a permutation an epoch, the same however it is asked for."""

import tracemalloc

import numpy as np
import pytest

from softprompt_dist.data.lm.order import GlobalOrder

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097]


@pytest.mark.parametrize("size", SIZES)
def test_every_epoch_visits_every_example_once(size):
    order = GlobalOrder(size, seed=3, fingerprint="corpus")
    for epoch in range(3):
        visited = order.indices(epoch * size, size)
        np.testing.assert_array_equal(np.sort(visited), np.arange(size))


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_positions_may_be_asked_for_in_any_way(size):
    order = GlobalOrder(size, seed=5, fingerprint="corpus")
    whole = order.indices(0, 2500)
    one_by_one = [GlobalOrder(size, 5, "corpus").indices(i, 1)[0] for i in (2499, 0, 1200)]
    assert one_by_one == [whole[2499], whole[0], whole[1200]]
    for first, count in ((0, 17), (990, 40), (1999, 501), (700, 0)):
        np.testing.assert_array_equal(order.indices(first, count), whole[first : first + count])


def test_epochs_seeds_and_corpora_differ():
    size = 500
    first_epoch = GlobalOrder(size, 1, "a").indices(0, size)
    others = [
        GlobalOrder(size, 1, "a").indices(size, size),
        GlobalOrder(size, 2, "a").indices(0, size),
        GlobalOrder(size, 1, "b").indices(0, size),
    ]
    for other in others:
        # Two unrelated permutations agree in one place on average.
        assert (other == first_epoch).sum() < 8


@pytest.mark.parametrize("size", [2, 3, 5, 10, 16, 40])
def test_every_example_is_equally_likely_everywhere(size):
    epochs = 6000
    visited = GlobalOrder(size, 11, "corpus").indices(0, size * epochs).reshape(epochs, size)
    counts = np.stack([(visited == example).sum(axis=0) for example in range(size)])
    chi_squared = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 4.5 * np.sqrt(2 * freedom) + 4


def test_all_orders_of_three_are_equally_likely():
    visited = GlobalOrder(3, 2, "corpus").indices(0, 3 * 6000).reshape(-1, 3)
    _, counts = np.unique(visited, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 4.5 * np.sqrt(1000)


def test_neighbours_are_unrelated():
    size = 20_000
    visited = GlobalOrder(size, 7, "corpus").indices(0, size) / size
    for lag in (1, 2, 128):
        correlation = np.corrcoef(visited[:-lag], visited[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), visited)[0, 1]) < 4 / np.sqrt(size)


def test_no_array_of_all_examples_is_made():
    tracemalloc.start()
    order = GlobalOrder(600_000_000, 1, "corpus")
    visited = order.indices(599_999_000, 2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(np.unique(visited[:1000])) == 1000
    assert visited.min() >= 0
    assert visited.max() < 600_000_000


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 10**30])
def test_any_seed_will_do(seed):
    assert sorted(GlobalOrder(9, seed, "corpus").indices(0, 9)) == list(range(9))


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, -1)])
def test_negative_positions_are_refused(first, count):
    with pytest.raises(ValueError, match="must not be negative"):
        GlobalOrder(4, 0, "").indices(first, count)


def test_no_examples_have_no_order():
    with pytest.raises(ValueError, match="needs 1"):
        GlobalOrder(0, 0, "")


def test_the_order_never_changes():
    """Runs are resumed by later versions: these must stay as they are."""
    assert GlobalOrder(1000, 1, "corpus").indices(0, 8).tolist() == [
        789,
        985,
        60,
        36,
        442,
        359,
        559,
        410,
    ]
