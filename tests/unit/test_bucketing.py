"""Cutting rows into batches: no row lost or doubled, the budget kept, every rank served alike."""

import random

import pytest

from softprompt_dist.data.bucketing import (
    MicroBatchLimit,
    batches_by_length,
    dealt,
    micro_batches_by_length,
)

SEEDS = range(12)


def drawn_lengths(seed, most_rows=300, longest=500):
    chosen = random.Random(seed)
    return [chosen.randint(1, longest) for _ in range(chosen.randint(1, most_rows))]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_index_is_in_one_batch_and_batches_keep_the_budget(seed):
    lengths = drawn_lengths(seed)
    batches = batches_by_length(lengths, prompt_length=20, budget=1500, extra=3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * (20 + max(lengths[i] for i in batch) + 3) <= 1500


@pytest.mark.parametrize("seed", SEEDS)
def test_no_batch_has_room_for_the_next_row(seed):
    lengths = drawn_lengths(seed)
    for batch in batches_by_length(lengths, prompt_length=20, budget=1500)[:-1]:
        assert (len(batch) + 1) * (20 + lengths[batch[0]]) > 1500


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_is_at_most_one_batch_of_the_longest_and_the_shortest(seed):
    lengths = drawn_lengths(seed)
    batches = batches_by_length(lengths, prompt_length=20, budget=1500)
    padding = sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)
    most_rows = max(map(len, batches))
    assert padding <= most_rows * (max(lengths) - min(lengths))


def test_batches_are_longest_first_with_ties_in_order():
    batches = batches_by_length([5, 9, 5, 7, 9], prompt_length=1, budget=20)
    assert batches == [[1, 4], [3, 0], [2]]


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    assert batches_by_length([50, 3, 2], prompt_length=1, budget=10) == [[0], [1, 2]]


def test_further_positions_of_a_row_count():
    assert batches_by_length([4, 4], prompt_length=1, budget=10) == [[0, 1]]
    assert batches_by_length([4, 4], prompt_length=1, budget=10, extra=1) == [[0], [1]]


def test_no_rows_make_no_batches():
    assert batches_by_length([], prompt_length=1, budget=10) == []
    assert micro_batches_by_length([], [], MicroBatchLimit(rows=4), 3) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "limit", [MicroBatchLimit(rows=4), MicroBatchLimit(positions=1200, prompt_length=20)]
)
def test_ranks_get_equal_numbers_of_micro_batches_that_keep_the_limit(seed, world_size, limit):
    inputs = drawn_lengths(seed, most_rows=70)
    chosen = random.Random(seed)
    targets = [chosen.randint(1, 40) for _ in inputs]
    batches = micro_batches_by_length(inputs, targets, limit, world_size)
    assert len(batches) % world_size == 0
    assert sorted(i for batch in batches for i in batch) == list(range(len(inputs)))
    assert all(batches) or max(map(len, batches)) == 1
    for batch in filter(None, batches):
        assert cost(batch, inputs, targets, limit) <= limit.units
    shares = [dealt(batches, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(batches) // world_size}
    assert sorted(map(tuple, sum(shares, []))) == sorted(map(tuple, batches))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_there_are_no_more_rounds_than_the_limit_asks_for(seed, world_size):
    inputs = drawn_lengths(seed, most_rows=70)
    limit = MicroBatchLimit(positions=1200, prompt_length=20)
    for_one_rank = micro_batches_by_length(inputs, [1] * len(inputs), limit, 1)
    assert len(for_one_rank) == len(
        batches_by_length(inputs, prompt_length=20, budget=1200, extra=1)
    )
    batches = micro_batches_by_length(inputs, [1] * len(inputs), limit, world_size)
    assert len(batches) < len(for_one_rank) + world_size


@pytest.mark.parametrize("seed", SEEDS)
def test_rounds_are_about_equally_costly_for_all_ranks(seed):
    inputs = sorted(drawn_lengths(seed, most_rows=70, longest=200) + [100] * 64)
    limit = MicroBatchLimit(positions=2400, prompt_length=20)
    batches = micro_batches_by_length(inputs, [1] * len(inputs), limit, 2)
    costs = [cost(batch, inputs, [1] * len(inputs), limit) for batch in batches]
    assert costs == sorted(costs, reverse=True)
    waited_for = sum(max(costs[i : i + 2]) for i in range(0, len(costs), 2))
    assert waited_for <= 0.6 * sum(costs)


def test_rows_that_divide_are_cut_as_one_counts():
    limit = MicroBatchLimit(rows=2)
    assert micro_batches_by_length([3, 9, 5, 7], [1] * 4, limit, 2) == [[1, 3], [2, 0]]


def test_rows_that_do_not_divide_are_cut_about_equally():
    batches = micro_batches_by_length([7] * 9, [1] * 9, MicroBatchLimit(rows=4), 1)
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    batches = micro_batches_by_length([7] * 5, [1] * 5, MicroBatchLimit(rows=4), 4)
    assert sorted(map(len, batches)) == [1, 1, 1, 2]


def test_fewer_rows_than_ranks_leave_the_last_ranks_empty():
    batches = micro_batches_by_length([3, 9], [1, 1], MicroBatchLimit(rows=4), 3)
    assert batches == [[1], [0], []]
    assert [dealt(batches, rank, 3) for rank in range(3)] == [[[1]], [[0]], [[]]]


def test_a_long_target_takes_positions_too():
    limit = MicroBatchLimit(positions=20, prompt_length=0)
    assert micro_batches_by_length([5, 5], [1, 10], limit, 1) == [[1], [0]]
    assert micro_batches_by_length([5, 5], [1, 5], limit, 1) == [[1, 0]]
    assert len(micro_batches_by_length([9, 5, 4], [1, 10, 1], limit, 1)) == 3


def test_micro_batches_are_dealt_back_and_forth():
    assert dealt(list("abcdef"), 0, 2) == ["a", "d", "e"]
    assert dealt(list("abcdef"), 1, 2) == ["b", "c", "f"]


@pytest.mark.parametrize("limits", [{}, {"rows": 0}, {"rows": 2, "positions": 9}])
def test_a_limit_that_is_none_is_refused(limits):
    with pytest.raises(ValueError, match="rows or positions"):
        MicroBatchLimit(**limits)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        batches_by_length([1], prompt_length=1, budget=0)


def cost(batch, inputs, targets, limit):
    longest = max(inputs[i] for i in batch), max(targets[i] for i in batch)
    return limit.cost(len(batch), *longest)
