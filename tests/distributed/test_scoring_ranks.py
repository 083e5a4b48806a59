"""Two ranks predict what one rank predicts, for every number of rows."""

import pytest

from softprompt_dist.parallel import ranks
from tests.stage import Stage

CELLS = [("seq2seq", False), ("seq2seq", True), ("causal", True)]
NUM_ROWS = (1, 5, 8, 23)


def predictions(folder, sharded):
    """Of the first n rows, for several n; batches of 4 a rank, none of which need be full."""
    stage = Stage(folder, sharded=sharded)
    return {
        f"{method} {count}": stage.scorer(method, 4).predict(stage.prompt, stage.rows[:count])
        for method in ("rank", "greedy")
        for count in NUM_ROWS
    }


def predictions_of_every_cell(folders):
    return {
        "cells": [predictions(folders[family], sharded) for family, sharded in CELLS],
        "world": ranks.world_size(),
    }


@pytest.fixture(scope="module")
def on_two_ranks(lively_t5, lively_llama, run_functions):
    folders = {"seq2seq": str(lively_t5), "causal": str(lively_llama)}
    return run_functions(predictions_of_every_cell, 2, folders=folders, timeout=120)


@pytest.mark.parametrize("cell", range(len(CELLS)))
def test_two_ranks_predict_as_one(on_two_ranks, lively_t5, lively_llama, cell):
    family, _ = CELLS[cell]
    alone = predictions({"seq2seq": lively_t5, "causal": lively_llama}[family], sharded=False)
    assert [len(alone[f"rank {count}"]) for count in NUM_ROWS] == list(NUM_ROWS)
    assert len(set(alone["rank 23"])) > 1
    assert len(set(alone["greedy 23"])) > 3
    for rank in (0, 1):
        assert on_two_ranks[rank]["world"] == 2
        assert on_two_ranks[rank]["cells"][cell] == alone
