"""Planning LM adaptation: operations, memory by ZeRO stage, bytes on disk, and what is chosen."""

from __future__ import annotations

import pytest

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.planning.work import training_operations

XXL = "google/t5-v1_1-xxl"


def known(name: str) -> Architecture:
    found = known_architecture(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("size", "teraflop_512_512", "exaflop_512_512", "exaflop_1024_256"),
    [
        ("small", 0.215, 44, 25),
        ("base", 0.772, 158, 97),
        ("large", 2.536, 519, 329),
        ("xl", 9.015, 1846, 1162),
        ("xxl", 34.73, 7113, 4462),
    ],
)
def test_operations_of_a_row_and_of_the_papers_hundred_thousand_steps(
    size: str, teraflop_512_512: float, exaflop_512_512: float, exaflop_1024_256: float
) -> None:
    """Arithmetic by hand: 3 (2L(4di+f)S + 4LSSi + 2L(6di+f)T + 4diLS + 4LTTi + 4LTSi + 2VdT)."""
    model = known(f"google/t5-v1_1-{size}")
    assert training_operations(model, 1, 512, 512) / 1e12 == pytest.approx(teraflop_512_512, 1e-3)
    for total, rows, lengths in (
        (exaflop_512_512, 2048, (512, 512)),
        (exaflop_1024_256, 1024, (1024, 256)),
    ):
        run = 100_000 * training_operations(model, rows, *lengths)
        assert run / 1e18 == pytest.approx(total, abs=0.5)


def test_operations_of_a_decoder_only_row_are_six_for_each_weight_and_token() -> None:
    seven = known("meta-llama/Llama-2-7b-hf")
    multiplied = seven.num_parameters - seven.embedding_size - seven.small_size
    by_hand = 6 * 64 * multiplied + 3 * 32 * 4 * 64**2 * 4096
    assert training_operations(seven, 1, 0, 64) == pytest.approx(by_hand, rel=1e-9)
