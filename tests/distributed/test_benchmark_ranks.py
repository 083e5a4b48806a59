"""Benchmarks in small: each side runs, and both do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cells, evaluation, gpu_xxl, rows, tuning


@pytest.fixture(autouse=True)
def snippets(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a film of {n} words , and not one of them is dull" for n in range(40)]
    made = [{"text": text, "label": "positive"} for text in texts]
    monkeypatch.setattr(rows, "vader_rows", lambda name: made)


def test_the_xxl_benchmark_runs_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "tiny", "--input-length", "16", "--prompt-length", "4", "--steps", "1"]
    which = ["--batches", "2", "--variants", gpu_xxl.PEFT, gpu_xxl.OURS_INT8]
    gpu_xxl.main([*small, *which, "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "gpu_xxl.json").read_text())["measured"]
    for name in (gpu_xxl.PEFT, gpu_xxl.OURS_INT8):
        assert measured[name]["batches"]["2"]["seconds"] > 0
    assert f"| {gpu_xxl.OURS_INT8} | 2 |" in capsys.readouterr().out


def test_peft_and_ours_do_the_same_work(tmp_path: Path) -> None:
    """Also the proof that the peer's head is the checkpoint's: its loss would be another."""
    small = ["--size", "tiny", "--prompt-length", "4", "--fixed-length", "32", "--steps", "1"]
    batch = ["--global-batch", "8", "--micro-batch", "2"]
    which = ["--variants", "a", "b", "--lengths", "real"]
    tuning.main([*small, *batch, *which, "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "tuning.json").read_text())["measured"]["real"]
    theirs, ours = (measured[name][0] for name in (tuning.PEER, tuning.OURS_ZERO3))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert theirs["steps"][0]["gather_bytes"] > 0
    assert ours["steps"][0]["gather_bytes"] > 0


def test_every_cell_of_the_tiny_t5_is_compared(tmp_path: Path) -> None:
    cells.main(["--backbones", "tiny T5", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "cells.json").read_text())
    assert [row["cell"] for row in report["table"]][: len(cells.CELLS)] == list(cells.CELLS)
    assert report["aims"]
    assert all(aim["reached"] for aim in report["aims"])
    rounding = report["measured"]["rounding"]["tiny T5"]
    assert 0 < rounding["gradient_difference"] < 1e-5


def test_every_way_to_score_gives_the_same_answers(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--rows", "18", "--rounds", "1", "--prompt-length", "4"]
    batches = ["--fixed-length", "300", "--batch-size", "4", "--batch-tokens", "600"]
    evaluation.main([*small, *batches, "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "evaluation.json").read_text())["measured"]
    ours, padded, theirs = (measured[name][0] for name in evaluation.VARIANTS)
    for method in evaluation.METHODS:
        assert ours[method]["answers"] == theirs[method]["answers"]
        assert padded[method]["answers"] == theirs[method]["answers"]
        assert padded[method]["positions"] == 18 * (4 + 300)
        needed = ours["input_tokens"] + 18 * 4
        assert needed <= ours[method]["positions"] < theirs[method]["positions"]
    assert evaluation.largest_difference(measured, evaluation.OURS, "rank") == pytest.approx(
        0.0, abs=1e-4
    )
    assert len(set(ours["greedy"]["answers"])) > 1  # or equality would say little
