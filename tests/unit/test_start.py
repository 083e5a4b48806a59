"""What a verb on one rank does not need, and so does not wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs
from tests.prompts import save_untuned

RUN = """
import sys
from importlib import import_module
import_module(f"softprompt_dist.{sys.argv[1]}").main(sys.argv[2:])
print("deepspeed" in sys.modules)
"""


@pytest.fixture
def run_alone(tmp_path: Path) -> Callable[..., str]:
    """`run_alone(verb, *options)`: its output, with no launcher; it builds nothing."""
    extensions = tmp_path / "extensions"

    def run(*arguments: str | Path) -> str:
        removed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environ = {k: v for k, v in os.environ.items() if k not in removed}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *map(str, arguments)],
            env=environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "PATH": os.defpath},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not extensions.exists()
        return done.stdout

    return run


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_one_rank_needs_no_deepspeed(
    sharding: str, run_alone: Callable[..., str], tiny_t5: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = runs.tiny_recipe(tiny_t5, tiny_data)
    recipe["backbone"]["sharding"] = sharding
    path = runs.write_recipe(tmp_path / "recipe.yaml", recipe)
    trained = run_alone("train", "--recipe", path, "--run-dir", tmp_path / "run", "--steps", "1")
    assert '"device": "cpu"' in trained
    assert trained.endswith("\nFalse\n")
    (tmp_path / "tuned").mkdir()
    prompt = save_untuned(tmp_path / "tuned", recipe)
    files = ["--input", tiny_data / "test.jsonl", "--output", tmp_path / "out.jsonl"]
    assert run_alone("predict", "--prompt", prompt, *files).endswith("\nFalse\n")
