import pytest

from softprompt_dist.data.order import ExampleOrder


def test_every_epoch_visits_every_example_once():
    order = ExampleOrder(10, seed=3)
    for epoch in range(4):
        assert sorted(order.indices(epoch * 10, 10)) == list(range(10))


def test_epochs_and_seeds_differ():
    first, second = ExampleOrder(50, seed=3), ExampleOrder(50, seed=4)
    assert first.indices(0, 50) != first.indices(50, 50)
    assert first.indices(0, 50) != second.indices(0, 50)


@pytest.mark.parametrize("batch", [1, 3, 7, 25])
def test_any_position_gives_the_same_example_however_it_is_reached(batch):
    whole = ExampleOrder(10, seed=1).indices(0, 75)
    stepped = ExampleOrder(10, seed=1)
    pieces = [stepped.indices(start, batch) for start in range(0, 75, batch)]
    assert [index for piece in pieces for index in piece][:75] == whole
    assert ExampleOrder(10, seed=1).indices(38, 5) == whole[38:43]


def test_a_count_larger_than_several_epochs_is_served():
    assert len(ExampleOrder(3, seed=0).indices(1, 20)) == 20


def test_the_order_is_pinned_so_that_old_checkpoints_resume_the_same_way():
    assert ExampleOrder(8, seed=42).indices(6, 6) == [5, 6, 5, 1, 4, 7]


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 0), (5, -1), (5, 2**64)])
def test_impossible_orders_are_refused(arguments):
    with pytest.raises(ValueError, match="order"):
        ExampleOrder(*arguments)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="negative"):
        ExampleOrder(5, seed=0).indices(-1, 2)
