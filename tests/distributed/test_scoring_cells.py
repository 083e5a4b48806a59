"""In every precision, what ranks with a part of the backbone predict is what one with all does."""

import importlib.util

import pytest

from tests.stage import Stage

ZERO3 = {"sharding": "zero3"}
INT8 = {"quantization": "int8"}
BF16 = {"dtype": "bf16"}
PRECISIONS = {"fp32": {}, "int8": INT8, "bf16": BF16}
CELLS = {
    "zero3, off-loaded": ("fp32", {**ZERO3, "offload": "cpu"}),
    "zero3 within nodes": ("fp32", {**ZERO3, "shard_group": "node"}),
    "int8": ("int8", INT8),
    "zero3 int8": ("int8", {**ZERO3, **INT8}),
    "zero3 int8, off-loaded": ("int8", {**ZERO3, **INT8, "offload": "cpu"}),
    "zero3 int8 within nodes": ("int8", {**ZERO3, **INT8, "shard_group": "node"}),
    "bf16": ("bf16", BF16),
    "zero3 bf16": ("bf16", {**ZERO3, **BF16}),
}
"""Name -> the precision, and settings of the backbone."""
if importlib.util.find_spec("bitsandbytes"):
    for kind in ("llm_int8", "nf4"):
        PRECISIONS[kind] = {"quantization": kind}
        CELLS[kind] = (kind, PRECISIONS[kind])
FAMILIES = ("seq2seq", "causal")
METHODS = ("rank", "greedy")
NUM_ROWS = (23, 3)
"""The second number leaves one rank of four without a row."""


def predictions(folder, settings):
    """By every method, of some rows and of few."""
    stage = Stage(folder, **settings)
    found = {
        f"{method} {count}": stage.predict(stage.rule(method), stage.rows[:count])
        for method in METHODS
        for count in NUM_ROWS
    }
    # So few positions that ranks pass through the model with one label, or a few, as rows allow.
    return found | {"rank in parts": stage.predict(stage.rule("rank"), batch_tokens=36)}


def predictions_in_cells(folders):
    return {
        f"{family}, {name}": predictions(folder, settings)
        for family, folder in folders.items()
        for name, (_, settings) in CELLS.items()
    }


def on_its_node(rank):
    return {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(scope="module")
def folders(lively_t5, lively_llama):
    return dict(zip(FAMILIES, (str(lively_t5), str(lively_llama)), strict=True))


@pytest.fixture(scope="module")
def on_two_nodes(folders, run_functions):
    """What each of four ranks found, two of them on each node."""
    return run_functions(predictions_in_cells, 4, folders=folders, env=on_its_node, timeout=300)


@pytest.fixture(scope="module")
def alone(folders):
    """(family, precision) -> what one rank with the whole backbone found."""
    return {
        (family, name): predictions(folder, settings)
        for family, folder in folders.items()
        for name, settings in PRECISIONS.items()
    }


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_ranks_predict_as_one_alone_in_the_same_precision(on_two_nodes, alone, family, cell):
    expected = alone[family, CELLS[cell][0]]
    assert len(set(expected["greedy 23"])) > 3
    assert len(set(expected["rank 23"])) > 1
    for rank in on_two_nodes:
        assert rank[f"{family}, {cell}"] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_precisions_differ_where_answers_are_free(alone, family):
    answers = [tuple(alone[family, name]["greedy 23"]) for name in PRECISIONS]
    assert len(set(answers)) > 1
