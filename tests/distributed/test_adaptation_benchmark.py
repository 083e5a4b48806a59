"""The adaptation benchmark in small: both sides run, on the same examples."""

from __future__ import annotations

import json

import pytest

from benchmarks import adaptation
from benchmarks import adaptation_table as tables

_WORDS = ["a", "model", "that", "reads", "on", "learns", "how", "any", "text", "goes", "on"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("benchmark")
    text = folder / "text.txt"
    lines = [" ".join(_WORDS[k % 7 : 8 + k % 4] * (1 + k % 5)) for k in range(2000)]
    text.write_text("\n".join(lines), encoding="utf-8")
    small = ["--size", "tiny", "--inputs-length", "64", "--span-targets-length", "14"]
    batch = ["--global-batch", "8", "--micro-batch", "2", "--peer-micro-batch", "2"]
    short = ["--rounds", "1", "--steps", "1", "--pipeline-seconds", "0", "--variants", *"acef"]
    adaptation.main(["--text", str(text), *small, *batch, *short, "--out", str(folder)])
    return json.loads((folder / "adaptation.json").read_text())


def losses(report: dict, name: str) -> list[float]:
    return report["measured"]["rounds"][name][0][0]["losses"]


def steps(report: dict, name: str) -> list[dict[str, float]]:
    return [answer["steps"][0] for answer in report["measured"]["rounds"][name][0]]


def test_both_sides_begin_with_the_same_loss_on_full_rows(report: dict) -> None:
    """Also the proof that the peer's head is the checkpoint's: its loss would be another."""
    theirs, ours = losses(report, tables.PEER_SPANS), losses(report, tables.OURS_SPANS)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert ours[1] != ours[0]
    assert theirs[1] != theirs[0]
    for name in (tables.PEER_SPANS, tables.OURS_SPANS):
        assert sum(step["real_tokens"] for step in steps(report, name)) == 8 * (64 + 14)


def test_both_sides_read_as_much_text_in_an_update(report: dict) -> None:
    tokens, positions = (
        {
            name: sum(step[count] for step in steps(report, name))
            for name in (tables.PEER, tables.OURS)
        }
        for count in ("real_tokens", "positions")
    )
    assert tokens[tables.OURS] == pytest.approx(tokens[tables.PEER], rel=0.2)
    assert positions[tables.OURS] == 8 * (64 + 64)
    assert tokens[tables.PEER] < positions[tables.PEER]


def test_every_aim_has_a_line(report: dict) -> None:
    named = [aim["what"] for aim in report["aims"]]
    assert sum("over HF" in what for what in named) == 2
    assert sum("matmul peak" in what for what in named) == 2
    assert sum("made by one core" in what for what in named) == 2
    assert all(aim["value"] > 0 for aim in report["aims"])
