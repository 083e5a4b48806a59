"""Whole runs in this process: what they leave behind, and what must not change their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softprompt_dist.config import TuneConfig
from softprompt_dist.parallel.join import join_world
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.session import train
from tests import runs

Tune = Callable[..., Path]
INITIALISATIONS = {
    "class_labels": [],
    "sampled_vocabulary": ["prompt.sampled_vocabulary_size=50"],
    "random_uniform_paper": [],
    "random_uniform_released": [],
    "text": ["prompt.text=the old green river"],
}


@pytest.fixture
def tune(tiny_recipe: Path, tmp_path: Path) -> Tune:
    """`tune(name, *overrides)`: directory of a run of 6 steps."""

    def run(name: str, *overrides: str) -> Path:
        settings = [f"run_directory={tmp_path / name}", "steps=6", "evaluation.every_steps=3"]
        train(load_recipe(TuneConfig, tiny_recipe, [*settings, *overrides]))
        return tmp_path / name

    return run


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in runs.metrics_without_time(run_dir, "train")]


def test_a_run_leaves_what_the_readme_promises(tune: Tune, tiny_t5: Path) -> None:
    run_dir = tune("run")
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "report.md",
        "results.json",
        "predictions/test.jsonl",
        "plots/learning_curve.png",
    ):
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "tensorboard").iterdir())
    kinds = [(line["kind"], line["step"]) for line in runs.metrics_without_time(run_dir)]
    assert [step for kind, step in kinds if kind == "train"] == [1, 2, 3, 4, 5, 6]
    assert [step for kind, step in kinds if kind == "validation"] == [0, 3, 6]
    assert [step for kind, step in kinds if kind == "test"] == [6]
    assert load_recipe(TuneConfig, run_dir / "config.yaml").steps == 6

    best = run_dir / "prompt" / "best.safetensors"
    facts = runs.prompt_metadata(best)
    scores = {
        line["step"]: line["accuracy"] for line in runs.metrics_without_time(run_dir, "validation")
    }
    assert facts["score"] == max(scores.values()) == scores[facts["step"]]
    assert (facts["identity"]["path"], facts["task"]) == (str(tiny_t5), "foods")
    assert (facts["prompt_length"], facts["d_model"]) == (5, 32)
    stored = runs.checkpoint_tensors(run_dir, 6)["best_prompt"]
    assert torch.equal(load_file(best)["prompt"], stored)


def test_a_decoder_only_backbone_goes_the_same_path(tune: Tune, tiny_llama: Path) -> None:
    run_dir = tune(
        "llama",
        f"backbone.path={tiny_llama}",
        "optimizer.name=adamw",
        "optimizer.learning_rate=0.02",
        "evaluation.method=greedy",
        "task.max_examples=8",  # the same batch at every step
        "steps=20",
    )
    curve = losses(run_dir)
    assert curve[-1] < curve[0] - 0.02


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(tune: Tune) -> None:
    first, second, other = tune("a"), tune("b"), tune("c", "seed=6")
    assert runs.metrics_without_time(first) == runs.metrics_without_time(second)
    assert losses(first) != losses(other)


def test_micro_batches_change_nothing_but_rounding(tune: Tune) -> None:
    whole = losses(tune("whole", "batch.micro_batch_size=8"))
    for size in (1, 2):
        parts = losses(tune(f"micro-{size}", f"batch.micro_batch_size={size}"))
        assert parts == pytest.approx(whole, abs=1e-5)


def test_dropout_is_drawn_anew_at_every_step_and_off_while_scoring(tune: Tune) -> None:
    without, with_dropout = tune("without"), tune("with", "backbone.dropout=0.3")
    assert losses(without) != losses(with_dropout)
    start = [runs.metrics_without_time(run, "validation")[0] for run in (without, with_dropout)]
    assert start[0] == start[1]


@pytest.mark.parametrize("kind", INITIALISATIONS)
@pytest.mark.parametrize("length", [1, 7])
def test_every_initialisation_trains(tune: Tune, kind: str, length: int) -> None:
    run_dir = tune(
        "run",
        f"prompt.initialisation={kind}",
        f"prompt.prompt_length={length}",
        *INITIALISATIONS[kind],
        "steps=1",
        "checkpoint.every_steps=1",
    )
    assert runs.checkpoint_tensors(run_dir, 1)["prompt"].shape == (length, 32)
    assert runs.prompt_metadata(run_dir / "prompt" / "best.safetensors")["initialisation"] == kind


def test_a_run_begins_where_a_prompt_file_ended(tune: Tune) -> None:
    first = tune("first")
    best = first / "prompt" / "best.safetensors"
    second = tune("second", "prompt.initialisation=file", f"prompt.file={best}", "steps=1")
    start = runs.metrics_without_time(second, "validation")[0]
    assert start["accuracy"] == runs.prompt_metadata(best)["score"]


def test_fresh_begins_again_and_keeps_the_old_checkpoints_aside(
    tune: Tune, tiny_recipe: Path
) -> None:
    run_dir = tune("run")
    again = [f"run_directory={run_dir}", "steps=2", "optimizer.learning_rate=0.1"]
    train(load_recipe(TuneConfig, tiny_recipe, again), fresh=True)
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"step-00000002", "discarded-step-00000006"}
    assert [line["step"] for line in runs.metrics_without_time(run_dir, "train")] == [1, 2]


def test_a_resume_publishes_the_best_prompt_of_its_checkpoint(tune: Tune) -> None:
    best = tune("run") / "prompt" / "best.safetensors"
    published = best.read_bytes()
    best.write_bytes(b"of steps after the checkpoint")
    tune("run")
    assert best.read_bytes() == published


def test_more_steps_continue_a_finished_run(tune: Tune) -> None:
    whole = tune("whole", "steps=12")
    tune("extended")
    extended = tune("extended", "steps=12")
    assert losses(extended) == losses(whole)
    assert (extended / "prompt" / "best.safetensors").read_bytes() == (
        whole / "prompt" / "best.safetensors"
    ).read_bytes()


@pytest.mark.drill("D19")
def test_a_resume_may_hold_the_backbone_otherwise(tune: Tune, lone_process: None) -> None:
    join_world()
    settings = ["checkpoint.every_steps=3"]
    tune("run", *settings, "steps=3")
    held_otherwise = [
        "backbone.sharding=zero3",
        "backbone.offload=cpu",
        "backbone.activation_checkpointing=full",
    ]
    resumed = tune("run", *settings, *held_otherwise)
    assert losses(resumed) == pytest.approx(losses(tune("whole", *settings)), abs=1e-5)
