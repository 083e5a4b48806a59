"""One, two and three ranks predict the same, for every number of rows and in every cell."""

import pytest

from softprompt_dist.parallel import ranks
from tests.stage import Stage

CELLS = [("seq2seq", False), ("seq2seq", True), ("causal", False), ("causal", True)]
NUM_ROWS = (1, 2, 5, 23)
METHODS = ("rank", "greedy")


def predictions(folder, sharded):
    """Of the first n rows, for several n: some leave ranks with less to do, or with nothing."""
    stage = Stage(folder, sharded=sharded)
    return {
        f"{method} {count}": stage.predict(stage.rule(method), stage.rows[:count])
        for method in METHODS
        for count in NUM_ROWS
    }


def predictions_of_every_cell(folders):
    return {
        "cells": [predictions(folders[family], sharded) for family, sharded in CELLS],
        "world": ranks.world_size(),
    }


@pytest.fixture(scope="module", params=[2, 3])
def on_ranks(request, lively_t5, lively_llama, run_functions):
    folders = {"seq2seq": str(lively_t5), "causal": str(lively_llama)}
    world_size = request.param
    found = run_functions(predictions_of_every_cell, world_size, folders=folders, timeout=200)
    assert [rank["world"] for rank in found] == [world_size] * world_size
    return found


@pytest.fixture(scope="module")
def alone(lively_t5, lively_llama):
    folders = {"seq2seq": lively_t5, "causal": lively_llama}
    return {family: predictions(folder, sharded=False) for family, folder in folders.items()}


@pytest.mark.parametrize("cell", range(len(CELLS)))
def test_all_ranks_predict_as_one_alone(on_ranks, alone, cell):
    expected = alone[CELLS[cell][0]]
    assert [len(expected[f"rank {count}"]) for count in NUM_ROWS] == list(NUM_ROWS)
    assert len(set(expected["rank 23"])) > 1
    assert len(set(expected["greedy 23"])) > 3
    for rank in on_ranks:
        assert rank["cells"][cell] == expected
