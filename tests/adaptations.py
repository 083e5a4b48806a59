"""A whole adaptation in small: a text, a new T5 or a given one, a recipe, what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

import softprompt_dist
from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation import loop, peak
from softprompt_dist.adaptation.run import AdaptationRun, build_run, start
from softprompt_dist.lifecycle import ownership

TOKENIZER = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"
ARCHITECTURE = {
    "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1
}  # fmt: skip
LINES = [f"Sentence {i}{' and more' * (i % 7)} is about river number {i * 3}." for i in range(80)]


def make_quick(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Leave out what takes long beside a few steps, and has tests of its own."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(cache))
    monkeypatch.setattr(loop, "draw_curves", lambda directory: None)
    monkeypatch.setattr(peak, "_SECONDS_OF_MEASURING", 0.0)
    monkeypatch.setattr(ownership, "_SETTLING_SECONDS", 0.0)


def recipe_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of four steps from nothing, on a text that is written into `folder`."""
    text = folder / "text.txt"
    text.write_text("\n".join(LINES))
    values = {
        "name": "small",
        "steps": 4,
        "init": "from_config",
        "architecture": ARCHITECTURE,
        "tokenizer": str(TOKENIZER),
        "corpus": [str(text)],
        "objective": "span_corruption",
        "inputs_length": 16,
        "targets_length": 16,
        "optimizer": "rms_scaled_adamw",
        "learning_rate": 0.02,
        "schedule": "constant",
        "warmup_steps": 2,
        "batch": {"global_batch_size": 12, "micro_batch_size": 6},
        "log_every_steps": 1,
        "evaluation": {"max_examples": 8},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
    }
    return values | changes


def config_of(folder: Path, run: str = "run", **changes: Any) -> AdaptConfig:
    """The checked recipe of a run in `folder`."""
    return AdaptConfig.model_validate(
        recipe_values(folder, run_directory=str(folder / run), **changes)
    )


def write_recipe(folder: Path, values: Mapping[str, Any]) -> Path:
    """A recipe file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return path


def started(config: AdaptConfig) -> AdaptationRun:
    """A run before its first step."""
    run = build_run(config, None)
    start(run)
    return run


def updates(run: AdaptationRun, count: int) -> list[dict[str, float]]:
    """Metrics of the next steps."""
    with run.batches() as batches:
        return [run.update(next(batches)) for _ in range(count)]


def weights_of(run: AdaptationRun) -> dict[str, Tensor]:
    """Of a world of one, where every tensor is in one piece."""
    return {
        name: tensor.pieces[0].values.clone()
        for name, tensor in run.engine.layout.weights().items()
    }


def assert_same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To the last bit."""
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not tensors[name].equal(expected[name])] == []


def exported(run_dir: Path, name: str = "export") -> dict[str, Tensor]:
    """Weights of an export that has one file."""
    return load_file(Path(run_dir) / name / "model.safetensors")


def checkpoint(run_dir: Path, step: int) -> Path:
    """Folder of a checkpoint."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights, moments and small state of a checkpoint."""
    folder = checkpoint(run_dir, step)
    return {
        name: tensor
        for file in ("model.safetensors", "small.safetensors")
        for name, tensor in load_file(folder / file).items()
    }


def checkpoint_state(run_dir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says besides its tensors, without the time it took."""
    state = json.loads((checkpoint(run_dir, step) / "state.json").read_text())["state"]
    return {name: value for name, value in state.items() if name != "seconds"}
