"""Every way to hold a backbone gives on a GPU the numbers that it gives on the CPU.

Each test has a variant whose "GPU" is the CPU, so that it is known to work before it meets one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cells
import launch
import pytest
import torch

from tests.models import make_causal, make_llama, make_t5, save_model

NUM_GPUS = torch.cuda.device_count()
DEVICES = [
    "cpu",
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
MODELS: dict[str, Callable[[], Any]] = {
    "t5": make_t5,
    "llama": make_llama,
    "Qwen2": lambda: make_causal("Qwen2"),
    "GPTNeo": lambda: make_causal("GPTNeo"),
}
"""T5, a tied head, biases, a window of attention."""
ZERO3 = {"sharding": "zero3"}
CELLS: dict[str, tuple[dict[str, str], float]] = {
    "replicated": ({}, 1e-4),
    "checkpointed": ({"activation_checkpointing": "full"}, 1e-4),
    "bf16": ({"dtype": "bf16"}, 0.05),
    "int8": ({"quantization": "int8"}, 1e-4),
    "int8 bf16": ({"quantization": "int8", "dtype": "bf16"}, 0.05),
    "zero3": (ZERO3, 1e-4),
    "zero3 bf16": ({**ZERO3, "dtype": "bf16"}, 0.05),
    "zero3 int8": ({**ZERO3, "quantization": "int8"}, 1e-4),
    "off-loaded": ({**ZERO3, "offload": "cpu"}, 1e-4),
}
"""Cell -> its settings, and how far (relative, by the norm) it may be from the CPU in fp32.

Of int8, from the CPU in int8.
"""
TUNED = {name: CELLS[name][0] for name in ("zero3", "zero3 bf16", "zero3 int8", "off-loaded")}
"""One rank alone brings nothing in and frees nothing, but where weights are off-loaded."""
NUM_STEPS = 20


def environment(device: str) -> dict[str, str]:
    """Of every rank: all GPUs, of which it takes its own, or none."""
    if device == "cpu":
        return {"DS_ACCELERATOR": "cpu"}
    every = ",".join(map(str, range(NUM_GPUS)))
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", every)}


def skip_if_too_few(device: str, world_size: int) -> None:
    """Skip this test where there are fewer GPUs than ranks."""
    if device == "gpu" and world_size > NUM_GPUS:
        pytest.skip(f"needs {world_size} CUDA devices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, with what the CPU makes of them alone."""
    folder = tmp_path_factory.mktemp("devices")
    work = {}
    for name, make in MODELS.items():
        work[str(save_model(make(), folder / name))] = {
            "reference": {},
            "reference int8": {"quantization": "int8"},
        }
    launch.run_function_on_ranks(
        cells.gradients_in_cells, 1, folder / "logs", env=environment("cpu"), timeout=300, work=work
    )
    return folder


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by the norm."""
    assert expected.norm() > 1e-3
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_and_gradient_are_those_of_the_cpu(
    folder: Path, device: str, world_size: int, tmp_path: Path
) -> None:
    skip_if_too_few(device, world_size)
    names = {cell: f"{device} {world_size} {cell}" for cell in CELLS}
    settings = {names[cell]: settings for cell, (settings, _) in CELLS.items()}
    launch.run_function_on_ranks(
        cells.gradients_in_cells,
        world_size,
        tmp_path / "logs",
        env=environment(device),
        timeout=500,
        work={str(folder / model): settings for model in MODELS},
    )
    far = {}
    for model in MODELS:
        for cell, (chosen, tolerance) in CELLS.items():
            reference = "reference int8" if "quantization" in chosen else "reference"
            gradients = cells.gradients(folder / model, names[cell], world_size)
            expected = cells.gradients(folder / model, reference, 1)[:, :1].expand_as(gradients)
            off = [distance(gradients, expected)]
            if world_size == 1:  # else a rank has other rows
                logits = cells.logits(folder / model, names[cell])
                off.append(distance(logits, cells.logits(folder / model, reference)))
            if not max(off) <= tolerance:
                far[model, cell] = off
    assert not far


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_nothing_that_was_freed_is_read_again(
    folder: Path, device: str, world_size: int, name: str, tmp_path: Path
) -> None:
    """Freed memory is filled with NaN after each block, forward and backward, for some steps."""
    skip_if_too_few(device, world_size)
    results = launch.run_function_on_ranks(
        cells.tuned_in_cells,
        world_size,
        tmp_path / "logs",
        env=environment(device),
        timeout=500,
        folder=folder / name,
        cells=TUNED,
        num_steps=NUM_STEPS,
    )
    for result in results:
        for cell in TUNED:
            poisoned = result[f"poisoned {cell}"]
            assert poisoned["fillings"] > NUM_STEPS
            assert poisoned["losses"] == pytest.approx(result[cell]["losses"], rel=1e-3)
            assert poisoned["losses"][-1] < poisoned["losses"][0]
