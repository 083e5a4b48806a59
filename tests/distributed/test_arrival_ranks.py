"""A backbone of which one rank lacks a byte is refused by all ranks, and none is left waiting."""

import shutil

import arrival_mutations
import pytest

from tests.models import make_t5, save_model

CELLS = {
    "replicated": {},
    "zero3": {"sharding": "zero3"},
    "zero3-int8": {"sharding": "zero3", "quantization": "int8"},
}


def copies(folder, tmp):
    """A whole folder for rank 0 and a broken one for rank 1."""
    whole = folder / "model.safetensors"
    truncated, empty = tmp / "truncated", tmp / "empty"
    for place in (truncated, empty):
        shutil.copytree(folder, place)
    (truncated / whole.name).write_bytes(whole.read_bytes()[:-100])
    (empty / whole.name).unlink()
    return {
        "truncated": [str(folder), str(truncated)],
        "no weights": [str(folder), str(empty)],
        "no folder": [str(folder), str(tmp / "nowhere")],
    }


@pytest.fixture(scope="module")
def said(run_functions, tmp_path_factory):
    """What each rank was told."""
    tmp = tmp_path_factory.mktemp("arrival")
    folder = save_model(make_t5(), tmp / "t5")
    return run_functions(
        arrival_mutations.load_with_mutations,
        2,
        folder=folder,
        cells=CELLS,
        broken=copies(folder, tmp),
        timeout=120,
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        ("byte", "lm_head.weight"),
        ("norm", "encoder.final_layer_norm.weight"),
        ("slot", arrival_mutations.LAST_MATRIX),
        ("row", arrival_mutations.LAST_MATRIX),
    ],
)
def test_what_one_rank_does_not_hold_is_named_on_all(said, cell, mutation, name):
    for of_rank in said:
        kind, text, on_all_ranks = of_rank[f"{cell}, {mutation}"]
        assert (kind, on_all_ranks) == ("BackboneError", True)
        assert "did not load whole: 0 tensors are not held in full ([]), 1 are not" in text
        assert name in text


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["truncated", "no weights", "no folder"])
def test_a_folder_that_is_broken_for_one_rank_stops_all(said, cell, name):
    texts = set()
    for of_rank in said:
        kind, text, on_all_ranks = of_rank[f"{cell}, {name}"]
        assert (kind, on_all_ranks) == ("BackboneError", True)
        texts.add(text)
    assert len(texts) == 1


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_ranks_load_the_whole_folder(said, cell):
    assert [of_rank[f"{cell}, whole again"] for of_rank in said] == [None, None]
