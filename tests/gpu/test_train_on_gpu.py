"""Whole short runs on a GPU, in bf16: the verb alone in a world of one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from tests import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("lone_process"),
]
REPOSITORY = Path(__file__).resolve().parents[2]


def train(*arguments: str | Path) -> None:
    """In a process of its own: DeepSpeed chooses CPU or GPU once for the life of a process."""
    command = [sys.executable, "-m", "softprompt_dist.train", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    # Not 0 as well if the backbone's weights are not, to the bit, those before step 1.
    assert done.returncode == 0, done.stderr


CELLS = {
    "replicated": ["sharding=replicated"],
    "checkpointed": ["sharding=replicated", "activation_checkpointing=full"],
    "int8": ["sharding=replicated", "quantization=int8"],
    "llm_int8": ["sharding=replicated", "quantization=llm_int8"],
    "nf4": ["sharding=replicated", "quantization=nf4"],
    "zero3": ["sharding=zero3"],
    "zero3 int8": ["sharding=zero3", "quantization=int8"],
    "zero3 checkpointed": ["sharding=zero3", "activation_checkpointing=full"],
    "off-loaded": ["sharding=zero3", "offload=cpu"],
    "off-loaded int8": ["sharding=zero3", "quantization=int8", "offload=cpu"],
}


@pytest.mark.parametrize("cell", CELLS)
def test_three_steps_train_the_prompt_and_nothing_else(
    cell: str, tiny_recipe: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    settings = [f"backbone.{setting}" for setting in (*CELLS[cell], "dtype=bf16")]
    settings.append("checkpoint.every_steps=1")
    arguments = [word for setting in settings for word in ("--set", setting)]
    train("--recipe", tiny_recipe, "--run-dir", tmp_path, "--steps", "3", *arguments)

    lines = runs.metrics_without_time(tmp_path, "train")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    prompts = [runs.checkpoint_tensors(tmp_path, step)["prompt"] for step in (1, 3)]
    assert not torch.equal(*prompts)
    best = tmp_path / "prompt" / "best.safetensors"
    prompt_PD = load_file(best)["prompt"]
    assert (prompt_PD.dtype, prompt_PD.shape) == (torch.float32, (5, 32))
    assert torch.isfinite(prompt_PD).all()
    on_disk = load_backbone(BackboneConfig(path=str(tiny_t5), sharding="replicated"))
    assert runs.prompt_metadata(best)["identity"]["weights"] == on_disk.identity.weights
