"""What a user can get wrong ends in one message with value, rule and remedy, and no traceback."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt_dist import evaluate, train
from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import session
from tests import runs
from tests.messages import Said, assert_message

pytestmark = pytest.mark.usefixtures("lone_process")


@pytest.fixture(scope="module")
def tuned(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run of two steps."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    session.train(load_recipe(TuneConfig, tiny_recipe, [f"run_directory={run_dir}", "steps=2"]))
    return run_dir


def with_rows(tiny_data: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Options that add rows to the train split."""
    good = (tiny_data / "train.jsonl").read_text()
    path = tmp_path / "train.jsonl"
    path.write_text(good + "".join(json.dumps(row) + "\n" for row in rows))
    return ["--set", f"task.source.train={path}", "--run-dir", str(tmp_path / "run")]


def test_an_unknown_key(said: Said, tiny_recipe: Path) -> None:
    arguments = ["--recipe", tiny_recipe, "--set", "optimizer.lerning_rate=1"]
    assert_message(said(train.main, *arguments), "optimizer.lerning_rate", "'learning_rate'?")


def test_a_traceback_is_shown_with_debug_alone(said: Said, tiny_recipe: Path) -> None:
    code, _, err = said(train.main, "--debug", "--recipe", tiny_recipe, "--set", "steps=0")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert "error: " in err


def test_a_missing_file(said: Said, tiny_recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    missing = tiny_data / "trian.jsonl"
    arguments = ["--set", f"task.source.train={missing}", "--run-dir", tmp_path]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, missing, "Did you mean 'train.jsonl'?")


def test_a_label_out_of_the_set(
    said: Said, tiny_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    bad = with_rows(tiny_data, tmp_path, [{"text": "we ate a pear", "label": "pear"}])
    outcome = said(train.main, "--recipe", tiny_recipe, *bad)
    assert_message(outcome, "Line 151", "'pear'", "apple, carrot, salmon")


def test_an_empty_text(said: Said, tiny_recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    bad = with_rows(tiny_data, tmp_path, [{"text": "  ", "label": "apple"}])
    assert_message(said(train.main, "--recipe", tiny_recipe, *bad), "Line 151", "empty text")


def test_a_text_over_the_limit_is_cut_counted_and_reported(
    said: Said,
    tiny_recipe: Path,
    tiny_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = with_rows(tiny_data, tmp_path, [{"text": "apple " * 99, "label": "apple"}] * 2)
    code, out, _ = said(train.main, "--recipe", tiny_recipe, *long, "--steps", "1")
    assert code == 0
    assert "tuned prompt" in out
    cut = "2 of 152 train inputs of foods are longer than backbone.max_input_tokens=48 and were cut"
    assert cut in caplog.text


def test_a_world_that_does_not_divide_the_batch(
    said: Said, tiny_recipe: Path, tmp_path: Path
) -> None:
    arguments = ["--set", "batch.micro_batch_size=3", "--run-dir", tmp_path]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, "global_batch_size is 8", "1 ranks", "global_batch_size=9")


def test_a_run_directory_that_cannot_be_made(said: Said, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run_dir = tmp_path / "file" / "run"
    outcome = said(train.main, "--recipe", tiny_recipe, "--run-dir", run_dir)
    assert_message(outcome, run_dir, "--run-dir")


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
FEW_POSITIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a table of 12": ({"max_position_embeddings": 12}, "the backbone has 12"),
    "longrope of 12": (
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 12}},
        "up to 12 here: beyond them its rotary frequencies (longrope)",
    ),
}


@pytest.mark.parametrize("case", FEW_POSITIONS)
def test_more_positions_than_the_backbone_has(
    said: Said, tiny_recipe: Path, tiny_llama: Path, tmp_path: Path, case: str
) -> None:
    change, reason = FEW_POSITIONS[case]
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", tmp_path / "run"]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, "prompt.prompt_length 5", reason)
    numbers = re.search(r"(\d+) tokens, make (\d+) positions.*_tokens by (\d+) or", outcome[2])
    assert numbers is not None, outcome[2]
    longest, needed, excess = map(int, numbers.groups())
    assert needed == 5 + longest
    assert excess == needed - 12


def test_answers_that_may_grow_beyond_the_backbones_positions(
    said: Said, tiny_recipe: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """GPT-like models have a table of positions: an answer that leaves it ends in a traceback."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 64}))
    arguments = ["--set", f"backbone.path={folder}", "--set", "evaluation.method=greedy"]
    arguments += ["--set", "evaluation.max_target_tokens=60", "--run-dir", tmp_path / "run"]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, "longest input with its answer", "the backbone has 64")


def test_resume_where_there_is_nothing(said: Said, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", tiny_recipe, "--run-dir", tmp_path, "--resume"]
    assert_message(said(train.main, *arguments), tmp_path / "checkpoints", "--run-dir")


def test_a_changed_recipe(said: Said, tiny_recipe: Path, tuned: Path) -> None:
    arguments = ["--recipe", tiny_recipe, "--run-dir", tuned, "--set", "prompt.prompt_length=6"]
    outcome = said(train.main, *arguments)
    assert_message(outcome, "prompt.prompt_length: saved 5, now 6", "--fresh")


def test_with_nothing_wrong_evaluate_repeats_the_run(
    said: Said, tuned: Path, tmp_path: Path
) -> None:
    prompt = tuned / "prompt" / "best.safetensors"
    folder = tmp_path / "new" / "folder"
    code, out, _ = said(evaluate.main, "--prompt", prompt, "--output", folder)
    assert code == 0
    answers = (tuned / "predictions" / "test.jsonl").read_bytes()
    assert (folder / "predictions.jsonl").read_bytes() == answers
    tuned_row = next(line for line in out.splitlines() if "tuned prompt" in line)
    assert tuned_row in (tuned / "report.md").read_text()


@pytest.fixture
def other_backbone(tiny_t5: Path, tmp_path: Path) -> Path:
    """The tiny T5 with other weights in its last layer."""
    folder = Path(shutil.copytree(tiny_t5, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.flip(weights["lm_head.weight"], dims=(0,))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_prompt_of_another_backbone_is_refused_unless_forced(
    said: Said, tuned: Path, other_backbone: Path
) -> None:
    prompt = tuned / "prompt" / "best.safetensors"
    arguments = ["--prompt", prompt, "--set", f"backbone.path={other_backbone}"]
    outcome = said(evaluate.main, *arguments)
    tuned_for = runs.prompt_metadata(prompt)["identity"]["weights"]
    assert_message(outcome, f"weights: {tuned_for} there, ", "--force")
    code, out, _ = said(evaluate.main, *arguments, "--force")
    assert code == 0
    assert "tuned prompt" in out


def test_a_prompt_of_another_width_is_refused_even_if_forced(
    said: Said, tuned: Path, tmp_path: Path
) -> None:
    wide = runs.save_t5(tmp_path / "wide", d_model=48)
    prompt = tuned / "prompt" / "best.safetensors"
    arguments = ["--prompt", prompt, "--set", f"backbone.path={wide}", "--force"]
    assert_message(said(evaluate.main, *arguments), prompt, "5 x 32", "48")


@pytest.mark.parametrize("content", [b"", b"nothing of ours"])
def test_a_file_that_is_no_prompt(said: Said, tuned: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.safetensors"
    file.write_bytes(content)
    recipe = tuned / "config.yaml"
    assert_message(said(evaluate.main, "--prompt", file, "--recipe", recipe), file)


def test_a_prompt_without_its_run_needs_a_recipe(said: Said, tuned: Path, tmp_path: Path) -> None:
    lone = shutil.copy(tuned / "prompt" / "best.safetensors", tmp_path)
    assert_message(said(evaluate.main, "--prompt", lone), lone, "--recipe")


def test_predictions_that_cannot_be_written(said: Said, tuned: Path, tmp_path: Path) -> None:
    prompt = tuned / "prompt" / "best.safetensors"
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        outcome = said(evaluate.main, "--prompt", prompt, "--output", place)
        assert_message(outcome, place, "--output")


def test_a_first_loss_that_is_not_finite_leaves_a_run_that_resumes(
    said: Said, tiny_recipe: Path, other_backbone: Path, tmp_path: Path
) -> None:
    weights = load_file(other_backbone / "model.safetensors")
    weights["lm_head.weight"][7] = torch.finfo(torch.float32).max
    save_file(weights, other_backbone / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--set", f"backbone.path={other_backbone}", "--run-dir", tmp_path / "run"]
    for resume in ([], ["--resume"]):
        code, _, err = said(train.main, "--recipe", tiny_recipe, *arguments, *resume)
        assert code == 4
        assert "error: Step 1: The loss is" in err
        assert "The state after step 0 is saved" in err
        lines = runs.metrics_without_time(tmp_path / "run")
        assert [(line["kind"], line["step"]) for line in lines] == [("validation", 0)]
    assert runs.checkpoint_folder(tmp_path / "run", 0).is_dir()
