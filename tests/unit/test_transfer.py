"""A tuned prompt on tasks that it was not tuned for, in one recipe."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.metrics.results import read_result
from softprompt_dist.recipe import check_values
from softprompt_dist.run.session import train
from tests import runs

Recipe = dict[str, Any]
GROWTH = {"apple": "left", "carrot": "right", "salmon": "river"}
"""Other label words for the same foods."""
TRANSLATION = {"fruit": "left", "root": "right", "fish": "river"}


def tune(run_dir: Path, recipe: Recipe, transfer: list[Recipe], *overrides: str) -> Path:
    """Run in this process; an earlier run of the directory is continued."""
    values = {**copy.deepcopy(recipe), "transfer": transfer}
    train(check_values(TuneConfig, values, [*overrides, f"run_directory={run_dir}"]))
    return run_dir


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def sides(folder: Path) -> Path:
    """Splits of a task with labels that the tuned task has not."""
    return runs.write_splits(folder / "sides", runs.SIDES)


@pytest.fixture(scope="module")
def recipe(lively_t5: Path, tiny_data: Path) -> Recipe:
    """Of two steps on the foods, after which answers differ from row to row."""
    values = runs.tiny_recipe(lively_t5, tiny_data)
    return {**values, "steps": 2, "optimizer": {"learning_rate": 2.0}}


@pytest.fixture(scope="module")
def ranked(recipe: Recipe, tiny_data: Path, sides: Path, folder: Path) -> Path:
    """Directory of a run that chooses among labels."""
    growth = runs.task("growth", tiny_data, GROWTH, ["test"])
    transfer: list[Recipe] = [
        {"task": growth, "translate": TRANSLATION},
        {"task": runs.task("sides", sides, runs.SIDES), "split": "validation"},
        {"task": runs.task("a/b foods", tiny_data, runs.ANSWERS), "max_examples": 8},
    ]
    return tune(folder / "ranked", recipe, transfer)


PLACES = {
    "growth, test": "transfer/growth-test",
    "sides, validation": "transfer/sides-validation",
    "a/b foods, test": "transfer/a-b-foods-test",
}


def test_the_same_rows_in_other_words_score_the_same(ranked: Path) -> None:
    home, away = read_result(ranked / "results.json"), ranked / PLACES["growth, test"]
    tuned = [json.loads(x) for x in (ranked / "predictions" / "test.jsonl").open()]
    assert len({row["prediction"] for row in tuned}) > 1
    translated = rows_of(away)
    assert [row["generated"] for row in translated] == [row["prediction"] for row in tuned]
    for row in translated:
        assert row["prediction"] == TRANSLATION[row["generated"]]
        assert row["correct"] == (row["prediction"] == row["target"])
        assert "label_scores" not in row
    assert {row["target"] for row in translated} == set(GROWTH.values())
    assert read_result(away / "results.json").values == home.values


def test_without_translation_a_task_is_answered_in_its_own_labels(ranked: Path) -> None:
    answered = rows_of(ranked / PLACES["sides, validation"])
    assert len(answered) == 21
    for row in answered:
        assert row["prediction"] in runs.SIDES.values()
        assert set(row["label_scores"]) == set(runs.SIDES.values())
        assert row["prediction"] == max(row["label_scores"], key=row["label_scores"].__getitem__)
        assert "generated" not in row


def test_a_sample_is_scored_where_one_is_asked_for(ranked: Path) -> None:
    assert len(rows_of(ranked / PLACES["a/b foods, test"])) == 8


def test_the_table_has_every_task_and_its_drop(ranked: Path) -> None:
    home = read_result(ranked / "results.json").score
    found = json.loads((ranked / "transfer.json").read_text())
    assert [f"{each['task']}, {each['split']}" for each in found] == ["foods, test", *PLACES]
    assert [each["tuned_for"] for each in found] == [True, False, False, False]
    assert found[0]["drop"] is None
    table = (ranked / "transfer.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    assert rows[2][:2] == ["foods, test", "tuned for"]
    for each, cells, (title, place) in zip(found[1:], rows[3:], PLACES.items(), strict=True):
        result = read_result(ranked / place / "results.json")
        assert each["score"] == result.score
        assert each["drop"] == pytest.approx(home - result.score)
        assert cells[:2] == [title, "zero-shot"]
        assert cells[3] == f"{result.score:.1f}"
        assert cells[5] == f"{home - result.score:.1f}"
        assert cells[6] == str(result.num_answers)
        assert (ranked / place / "report.md").read_text().startswith(f"# {title}\n")
    # Floors only where there is a train split to learn them from.
    assert set(read_result(ranked / PLACES["growth, test"] / "results.json").others) == set()
    others = read_result(ranked / PLACES["sides, validation"] / "results.json").others
    assert set(others) == {"majority class", "naive Bayes"}


def test_every_task_is_in_the_record_of_the_data(ranked: Path) -> None:
    records = json.loads((ranked / "data.json").read_text())
    assert list(records) == ["foods", "growth", "sides", "a/b foods"]
    assert list(records["growth"]) == ["test"]
    assert records["growth"]["test"]["num_examples"] == 21


@pytest.fixture(scope="module")
def generated(recipe: Recipe, tiny_data: Path, sides: Path, folder: Path) -> tuple[Path, str]:
    """A run that generates, and its commonest answer, which `translate` was then told to mean."""
    run_dir = tune(folder / "generated", recipe, [], "evaluation.method=greedy")
    assert not (run_dir / "transfer.md").exists()
    rows = map(json.loads, (run_dir / "predictions" / "test.jsonl").open())
    texts = Counter(row["prediction"] for row in rows if row["prediction"])
    ((common, count),) = texts.most_common(1)
    assert 0 < count < 21
    growth = runs.task("growth", tiny_data, GROWTH, ["test"])
    transfer: list[Recipe] = [
        {"task": growth, "translate": {common: "left"}},
        {"task": runs.task("sides", sides, runs.SIDES)},
    ]
    return tune(run_dir, recipe, transfer, "evaluation.method=greedy"), common


def test_generated_answers_are_translated_where_they_occur(generated: tuple[Path, str]) -> None:
    run_dir, common = generated
    rows = rows_of(run_dir / "transfer" / "growth-test")
    for row in rows:
        assert row["prediction"] == row["generated"].replace(common, "left")
    meant = [row for row in rows if row["prediction"] == "left"]
    assert 0 < len(meant) < len(rows)
    assert {row["correct"] for row in meant} == {row["target"] == "left" for row in meant}
    result = read_result(run_dir / "transfer" / "growth-test" / "results.json")
    right = sum(row["target"] == "left" for row in meant)
    assert result.values["accuracy"] == pytest.approx(100 * right / len(rows))
    assert result.num_invalid == len(rows) - len(meant)


def test_a_finished_run_may_be_scored_on_more_tasks(generated: tuple[Path, str]) -> None:
    run_dir, _ = generated
    answered = rows_of(run_dir / "transfer" / "sides-test")
    assert len(answered) == 21
    assert "generated" not in answered[0]
    titles = [each["task"] for each in json.loads((run_dir / "transfer.json").read_text())]
    assert titles == ["foods", "growth", "sides"]
    assert [line["step"] for line in runs.metrics_without_time(run_dir, "train")] == [1, 2]


def test_free_text_is_no_target_of_a_choice_among_labels(
    recipe: Recipe, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"'words' are free text.*evaluation\.method=greedy"):
        tune(tmp_path, recipe, [{"task": runs.task("words", tiny_data, {})}])


def test_a_translation_to_no_label_is_refused_before_tuning(
    recipe: Recipe, tiny_data: Path, tmp_path: Path
) -> None:
    growth = runs.task("growth", tiny_data, GROWTH, ["test"])
    said = r"makes 'lefd' of foods's label 'fruit', which is no label of growth: left, right, river"
    with pytest.raises(ConfigError, match=said):
        tune(tmp_path, recipe, [{"task": growth, "translate": {**TRANSLATION, "fruit": "lefd"}}])


def named(name: str, **more: Any) -> Recipe:
    return {"name": name, "source": {"kind": "vader", "name": "movies"}, **more}


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        check_values(TuneConfig, values, [])
    return str(refused.value)


def test_tasks_whose_results_would_lie_in_one_place_are_refused() -> None:
    said = refusal(task=named("a"), mixture={"tasks": [named("b"), named("a")]})
    assert "task.name is 'a' and mixture.tasks.1.name is 'a'" in said
    assert "Set another mixture.tasks.1.name." in said
    twice = [{"task": named("a b")}, {"task": named("a/b")}]
    said = refusal(task=named("c"), transfer=twice)
    assert "transfer.0.task.name is 'a b' and transfer.1.task.name is 'a/b'" in said
    other = {"task": named("a", max_examples=3), "split": "validation"}
    assert "Set another transfer.0.task.name." in refusal(task=named("a"), transfer=[other])
    default = {"task": {"source": {"kind": "vader", "name": "nyt"}}}
    assert "'vader-movies'" in refusal(transfer=[default])


def test_one_task_may_be_scored_on_several_splits() -> None:
    splits = [{"task": named("b"), "split": split} for split in ("train", "validation", "test")]
    own = {"task": named("a"), "split": "validation"}
    config = check_values(TuneConfig, {"task": named("a"), "transfer": [*splits, own]}, [])
    assert len(config.transfer) == 4


def test_an_unknown_key_of_a_task_in_a_list_is_named_with_the_nearest() -> None:
    said = refusal(mixture={"tasks": [named("b", lables={})]})
    assert "Unknown key 'mixture.tasks.0.lables'. Did you mean 'labels'?" in said
