"""The recipes of docs/own-task.md run as they are written, on the rows written below them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from softprompt_dist.data.tasks import load_task
from softprompt_dist.task_config import TaskConfig

PAGE = (Path(__file__).parents[2] / "docs" / "own-task.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(yaml|json)\n(.*?)```", PAGE, flags=re.DOTALL)
RECIPES = [block for kind, block in BLOCKS if kind == "yaml"]
WITH_ROWS = [
    (recipe, rows)
    for (kind, recipe), (next_kind, rows) in zip(BLOCKS, BLOCKS[1:], strict=False)
    if (kind, next_kind) == ("yaml", "json")
]


def task_of(recipe: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(recipe)["task"]
    return found


def examples_of(recipe: str, rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All examples of the recipe, whose files each have all the rows."""
    monkeypatch.chdir(folder)
    for name in ("tickets.jsonl", "train.jsonl", "dev.jsonl", "test.jsonl"):
        Path(name).write_text(rows, encoding="utf-8")
    settings = task_of(recipe)
    settings["source"] = dict.fromkeys(("train", "validation", "test"), settings["source"]["train"])
    data = load_task(TaskConfig(**settings), ("validation",))
    return data, {example.id: example for example in data.validation}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_the_page_is_valid(recipe: str) -> None:
    written = task_of(recipe)
    read = TaskConfig(**written).model_dump(exclude_unset=True)
    assert read["source"] == written["source"]
    assert {key: read[key] for key in written} == written


def test_the_page_has_recipes_with_and_without_rows() -> None:
    assert len(RECIPES) > len(WITH_ROWS) == 2


def test_the_task_with_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, rows = WITH_ROWS[0]
    assert len(recipe.splitlines()) <= 10
    data, examples = examples_of(recipe, rows, tmp_path, monkeypatch)
    assert len(examples) == 3
    assert examples["1"].input_text == "ticket: Down Nothing works since noon."
    assert [examples[n].target_text for n in "123"] == ["urgent", "can wait", "can wait"]
    assert data.metrics == ("accuracy",)


def test_the_task_of_free_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, rows = WITH_ROWS[1]
    assert len(recipe.splitlines()) <= 10
    data, examples = examples_of(recipe, rows, tmp_path, monkeypatch)
    assert {name: e.facts["answers"] for name, e in examples.items()} == {
        "a1": ["The Hague", "Den Haag"],
        "a2": ["1831"],
        "a3": ["Bern"],
    }
    assert examples["a1"].target_text == "The Hague"
    assert data.metrics == ("squad",)
