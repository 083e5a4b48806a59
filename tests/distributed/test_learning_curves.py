"""A hundred steps end where they end, however the backbone is cut."""

import learning
import pytest

from tests.models import make_t5, save_model

ZERO3 = {"sharding": "zero3"}
INT8 = {"quantization": "int8"}
CELLS = {"int8": INT8, "zero3-int8": {**ZERO3, **INT8}, "zero3": ZERO3}


@pytest.fixture(scope="module")
def curves(run_functions, tmp_path_factory):
    folder = save_model(make_t5(), tmp_path_factory.mktemp("learning") / "t5")
    on_ranks = run_functions(learning.learning_curves, 2, folder=folder, cells=CELLS, timeout=120)
    assert on_ranks[0] == on_ranks[1]
    return on_ranks[0]


def test_the_prompt_learns(curves):
    for losses in curves.values():
        assert losses[-1] < 0.8 * losses[0]


def test_int8_learns_the_same_sharded_and_whole(curves):
    assert curves["zero3-int8"] == pytest.approx(curves["int8"], rel=1e-3)


def test_int8_learns_as_fp32_does(curves):
    assert curves["zero3-int8"] == pytest.approx(curves["zero3"], rel=0.1)
    assert curves["zero3-int8"] != curves["zero3"]
