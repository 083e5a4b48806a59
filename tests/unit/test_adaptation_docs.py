"""Recipes and commands of docs/adaptation.md are ones that work."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from softprompt_dist import cli
from softprompt_dist.adapt_stages import load_stages
from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "adaptation.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL))
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.replace("\\\n", " ").splitlines()]


@pytest.fixture
def in_folder_with_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trial.yaml").write_text(RECIPES[0])
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_folder_with_recipe")
def test_the_recipes_are_right(tmp_path: Path) -> None:
    assert len(RECIPES) == 2
    (trial,) = load_stages("trial.yaml")
    assert trial.run_directory == "runs/trial"
    (tmp_path / "stages.yaml").write_text(RECIPES[1])
    stages = load_stages("stages.yaml")
    folders = [stage.run_directory for stage in stages]
    assert folders == ["runs/in-house/span", "runs/in-house/lm"]
    assert stages[1].backbone == "runs/in-house/span/export"


@pytest.mark.usefixtures("in_folder_with_recipe")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_are_right(command: list[str]) -> None:
    if command[0] == "deepspeed":
        verb = command[command.index("-m") + 1].rpartition(".")[2]
        arguments = command[command.index("-m") + 2 :]
    else:
        assert command[0] == "softprompt"
        verb, arguments = command[1], command[2:]
    options = importlib.import_module(cli.module_of(verb)).build_parser().parse_args(arguments)
    if verb in ("adapt", "doctor"):
        load_stages(options.recipe, options.overrides)
    elif verb == "train":
        load_recipe(TuneConfig, options.recipe, options.overrides)


def test_commands_are_found() -> None:
    assert len(COMMANDS) == 8
