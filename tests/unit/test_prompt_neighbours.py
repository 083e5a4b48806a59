import pytest
import torch

from softprompt_dist.prompt.neighbours import nearest_pieces

TABLE = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 0.0]])


def test_pieces_are_ordered_by_angle_and_not_by_length():
    prompt = torch.tensor([[0.1, 0.0], [50.0, 49.0]])

    nearest = nearest_pieces(prompt, TABLE, 2)

    assert nearest.ids_PK.tolist() == [[0, 2], [2, 0]]
    assert nearest.cosines_PK[0].tolist() == pytest.approx([1.0, 0.5**0.5])


def test_vector_without_length_is_near_nothing():
    nearest = nearest_pieces(torch.zeros(1, 2), TABLE, 1)

    assert nearest.cosines_PK.tolist() == [[0.0]]


def test_no_more_neighbours_than_pieces():
    assert nearest_pieces(torch.ones(3, 2), TABLE, 10).ids_PK.shape == (3, 4)


def test_long_prompt_gives_a_row_each():
    prompt = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))

    nearest = nearest_pieces(prompt, TABLE, 1)

    again = nearest_pieces(prompt[700:701], TABLE, 1)
    assert nearest.ids_PK.shape == (1000, 1)
    torch.testing.assert_close(nearest.cosines_PK[700:701], again.cosines_PK)
