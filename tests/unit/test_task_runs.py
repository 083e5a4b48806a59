"""Runs on tasks with metrics of their own: validation, early stopping, mixtures, records."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from softprompt_dist import evaluate, inspect
from softprompt_dist.backbone.load import load_tokenizer
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.mixture import MixtureOrder
from softprompt_dist.data.tasks import load_task
from softprompt_dist.errors import BackboneError, DataError
from softprompt_dist.metrics.results import read_result
from softprompt_dist.recipe import check_values
from softprompt_dist.run.session import train
from tests import runs
from tests.messages import Said
from tests.models import make_t5, save_model

Recipe = dict[str, Any]
STILL = "optimizer.learning_rate=1e-12"
"""The prompt hardly moves, so no validation differs from the first."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a second task's splits."""
    return runs.write_splits(tmp_path_factory.mktemp("sides"), runs.SIDES)


@pytest.fixture(scope="module")
def recipe(tiny_t5: Path, tiny_data: Path) -> Recipe:
    """Six steps with a validation and a checkpoint after each third."""
    values = runs.tiny_recipe(tiny_t5, tiny_data) | {"steps": 6, "checkpoint": {"every_steps": 3}}
    values["evaluation"] |= {"every_steps": 3}
    return values


@pytest.fixture(scope="module")
def mixed(recipe: Recipe, sides: Path) -> Recipe:
    """The same of two tasks."""
    return {**recipe, "mixture": {"tasks": [runs.task("sides", sides, runs.SIDES)]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def tune(run_dir: Path, recipe: Recipe, *overrides: str) -> Path:
    """Run in this process."""
    values = copy.deepcopy(recipe)
    train(check_values(TuneConfig, values, [*overrides, f"run_directory={run_dir}"]))
    return run_dir


def validations(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> values."""
    return {
        line["step"]: {name: line[name] for name in line if name not in ("step", "kind")}
        for line in runs.metrics_without_time(run_dir, "validation")
    }


def best_of(run_dir: Path) -> dict[str, Any]:
    return runs.prompt_metadata(run_dir / "prompt" / "best.safetensors")


def best_bytes(run_dir: Path) -> bytes:
    return (run_dir / "prompt" / "best.safetensors").read_bytes()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_best_by_score(run_dir: Path) -> None:
    scores = {step: values["score"] for step, values in validations(run_dir).items()}
    best = best_of(run_dir)
    assert (best["metric"], best["score"]) == ("score", max(scores.values()))
    # Of equals the later.
    assert best["step"] == max(step for step, score in scores.items() if score == best["score"])


def test_the_best_prompt_is_that_of_the_mean_of_the_tasks_metrics(
    recipe: Recipe, sides: Path, tmp_path: Path
) -> None:
    task = runs.task("sides", sides, runs.SIDES, metrics=["f1", "accuracy"])
    run_dir = tune(tmp_path, {**recipe, "task": task}, "evaluation.every_steps=1")
    values = validations(run_dir)
    assert list(values) == [0, 1, 2, 3, 4, 5, 6]
    for each in values.values():
        assert set(each) == {"f1", "accuracy", "score"}
        assert each["score"] == pytest.approx((each["f1"] + each["accuracy"]) / 2)
    assert max(each["accuracy"] for each in values.values()) > 1  # percent
    assert len({each["score"] for each in values.values()}) > 1
    assert_best_by_score(run_dir)
    result = read_result(run_dir / "results.json")
    (tested,) = runs.metrics_without_time(run_dir, "test")
    assert result.values == {name: tested[name] for name in ("f1", "accuracy")}
    assert result.score == tested["score"]


@pytest.fixture(scope="module")
def free_text(recipe: Recipe, lively_t5: Path, tiny_data: Path, folder: Path) -> Recipe:
    """A task of free text, of whose test answers some are what the untuned prompt answers."""
    data = folder / "free text"
    for split in ("train", "validation", "test"):
        rows = lines_of(tiny_data / f"{split}.jsonl")
        made = [{**row, "id": n, "answers": [row["text"]]} for n, row in enumerate(rows)]
        runs.write_rows(data / f"{split}.jsonl", made)
    task = runs.task("words", data, {}, label_field="answers", id_field="id")
    values = {**recipe, "task": task, "backbone": {**recipe["backbone"], "path": str(lively_t5)}}
    values["evaluation"] = {**recipe["evaluation"], "method": "greedy", "max_target_tokens": 3}
    values["prompt"] = {"prompt_length": 5, "initialisation": "sampled_vocabulary"}

    first = tune(folder / "unknown", values, "steps=1", f"task.source.validation={data}/test.jsonl")
    untuned = json.loads((first / "predictions" / "untuned.json").read_text())["words"]
    asked = lines_of(first / "predictions" / "test.jsonl")
    known = {row["id"]: text for row, text in zip(asked, untuned, strict=True) if text}
    assert len(set(known.values())) > 3
    rows = lines_of(data / "test.jsonl")
    for row in rows[::2]:
        row["answers"].append(known.get(str(row["id"]), "river"))
    runs.write_rows(data / "test.jsonl", rows)
    runs.write_rows(data / "validation.jsonl", rows)
    return values


def test_free_text_is_judged_by_any_of_its_answers(free_text: Recipe, folder: Path) -> None:
    run_dir = tune(folder / "known", free_text)
    values = validations(run_dir)
    assert 40 <= values[0]["em"] <= 60
    for each in values.values():
        assert set(each) == {"em", "f1", "score"}
        assert each["score"] == pytest.approx((each["em"] + each["f1"]) / 2)
    assert len({each["em"] for each in values.values()}) > 1
    assert_best_by_score(run_dir)
    rows = lines_of(run_dir / "predictions" / "test.jsonl")
    result = read_result(run_dir / "results.json")
    assert result.values["em"] == pytest.approx(100 * sum(row["correct"] for row in rows) / 21)
    assert not (run_dir / "plots" / "confusion.png").exists()


def test_patience_ends_a_run_and_another_goes_on(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go_on(patience: str) -> str:
        capsys.readouterr()
        settings = [STILL, "evaluation.every_steps=1", "steps=9"]
        tune(tmp_path, recipe, *settings, f"evaluation.early_stopping_patience={patience}")
        return capsys.readouterr().out

    first = go_on("2")
    assert list(validations(tmp_path)) == [0, 1, 2]
    assert "Stopped after step 2: 2 validations in a row were no better than" in first
    assert "(evaluation.early_stopping_patience)" in first
    assert runs.checkpoint_folder(tmp_path, 2).is_dir()
    assert best_of(tmp_path)["step"] == 2
    names = ("results.json", "report.md", "predictions/test.jsonl", "prompt/best.safetensors")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    metrics = runs.metrics_without_time(tmp_path)
    assert [line["step"] for line in metrics if line["kind"] == "test"] == [2]

    for patience in ("2", "1"):
        assert "Stopped after step 2: 2 validations" in go_on(patience)
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
        assert runs.metrics_without_time(tmp_path) == metrics

    assert "Stopped after step 4: 4 validations" in go_on("4")
    assert list(validations(tmp_path)) == [0, 1, 2, 3, 4]
    assert "Stopped" not in go_on("null")
    assert list(validations(tmp_path))[-1] == 9


def test_a_better_validation_renews_patience(recipe: Recipe, sides: Path, tmp_path: Path) -> None:
    values = {**recipe, "task": runs.task("sides", sides, runs.SIDES)}
    settings = ["evaluation.every_steps=1", "steps=8", "checkpoint.every_steps=8"]
    whole = validations(tune(tmp_path / "whole", values, *settings))
    scores = [each["accuracy"] for each in whole.values()]
    last_gain = scores.index(max(scores))
    assert 0 < last_gain < 5
    patience = last_gain + 1
    stopped = tune(
        tmp_path / "stopped", values, *settings, f"evaluation.early_stopping_patience={patience}"
    )
    assert list(validations(stopped)) == list(range(last_gain + patience + 1))


@pytest.fixture(scope="module")
def mixture(mixed: Recipe, folder: Path) -> Path:
    """Directory of a run on two tasks."""
    return tune(folder / "mixture", mixed)


def test_a_mixture_is_validated_task_by_task(mixture: Path) -> None:
    values = validations(mixture)
    assert list(values) == [0, 3, 6]
    for each in values.values():
        assert set(each) == {"foods/accuracy", "sides/accuracy", "score"}
        mean = (each["foods/accuracy"] + each["sides/accuracy"]) / 2
        assert each["score"] == pytest.approx(mean)
    assert_best_by_score(mixture)
    assert best_of(mixture)["task"] == "foods+sides"


def test_a_mixture_reports_each_task(mixture: Path) -> None:
    results = {"foods": mixture, "sides": mixture / "tasks" / "sides-test"}
    (tested,) = runs.metrics_without_time(mixture, "test")
    for name, place in results.items():
        result = read_result(place / "results.json")
        assert (result.task, result.split) == (name, "test")
        assert tested[f"{name}/accuracy"] == result.values["accuracy"]
        assert set(result.others) == {"majority class", "naive Bayes", "untuned prompt"}
        assert (place / "report.md").read_text().startswith(f"# {name}, test\n")
    assert len(lines_of(mixture / "tasks" / "sides-test" / "predictions.jsonl")) == 21
    answered = lines_of(mixture / "tasks" / "sides-test" / "predictions.jsonl")
    assert {row["prediction"] for row in answered} <= set(runs.SIDES.values())
    assert (mixture / "tasks" / "sides-test" / "confusion.png").exists()


@pytest.mark.usefixtures("lone_process")
def test_each_task_of_a_mixture_can_be_evaluated_by_name(
    said: Said, mixture: Path, tmp_path: Path
) -> None:
    prompt = mixture / "prompt" / "best.safetensors"
    for name, place in {"foods": mixture, "sides": mixture / "tasks" / "sides-test"}.items():
        output = tmp_path / name
        code, out, _ = said(evaluate.main, "--prompt", prompt, "--task", name, "--output", output)
        assert (code, out.splitlines()[0]) == (0, f"{name}, test")
        assert read_result(output).values == read_result(place / "results.json").values
        assert read_result(output).data == read_result(place / "results.json").data


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        ([], [0.5, 0.5]),
        (["task.max_examples=50", "steps=3"], [0.25, 0.75]),
        (["task.max_examples=50", "mixture.maximum=50", "steps=3"], [0.5, 0.5]),
    ],
)
def test_the_updates_of_a_mixture_are_those_of_its_order(
    mixed: Recipe, tiny_t5: Path, tmp_path: Path, overrides: list[str], rates: list[float]
) -> None:
    config = check_values(TuneConfig, copy.deepcopy(mixed), overrides)
    tasks = [load_task(each).train for each in (config.task, *config.mixture.tasks)]
    order = MixtureOrder([len(task) for task in tasks], rates, seed=5)
    tokenizer = load_tokenizer(tiny_t5)
    expected = []
    for step in range(config.steps):
        targets = [tasks[task][i].target_text for task, i in order.pairs(8 * step, 8)]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in targets]
        expected.append(sum(len(row) + 1 for row in ids))
    lines = runs.metrics_without_time(tune(tmp_path, mixed, *overrides), "train")
    assert [line["num_tokens"] for line in lines] == expected
    assert len(set(expected)) > 1


def test_a_mixture_resumes_to_the_bit(mixture: Path, mixed: Recipe, tmp_path: Path) -> None:
    tune(tmp_path, mixed, "steps=3")
    assert best_bytes(tmp_path) != best_bytes(mixture)
    tune(tmp_path, mixed)
    for name in ("state.safetensors", "state.json"):
        ours, theirs = (runs.checkpoint_folder(run, 6) / name for run in (tmp_path, mixture))
        assert ours.read_bytes() == theirs.read_bytes()
    assert best_bytes(tmp_path) == best_bytes(mixture)
    assert validations(tmp_path) == validations(mixture)


@pytest.mark.parametrize("tokens", [1, 70, 10000])
def test_a_budget_of_tokens_changes_nothing_but_rounding(
    mixture: Path, mixed: Recipe, tmp_path: Path, tokens: int
) -> None:
    run_dir = tune(tmp_path, mixed, f"batch.micro_batch_tokens={tokens}")
    ours, expected = (runs.metrics_without_time(run, "train") for run in (run_dir, mixture))
    assert [line["num_tokens"] for line in ours] == [line["num_tokens"] for line in expected]
    for name in ("loss", "gradient_norm"):
        found = [line[name] for line in ours]
        assert found == pytest.approx([line[name] for line in expected], abs=1e-5)
    prompts = [runs.checkpoint_tensors(run, 6)["prompt"] for run in (run_dir, mixture)]
    assert float((prompts[0] - prompts[1]).abs().max()) < 1e-4


def test_the_record_of_the_data_says_what_was_read(
    mixed: Recipe, tiny_data: Path, tmp_path: Path
) -> None:
    values = copy.deepcopy(mixed)
    train_file = tmp_path / "train.jsonl"
    good = (tiny_data / "train.jsonl").read_text()
    train_file.write_text(good + '{"text": "we ate a pear", "label": "pear"}\nbroken\n')
    sha256 = hashlib.sha256(train_file.read_bytes()).hexdigest()
    values["task"]["source"] |= {"train": str(train_file), "sha256": {"train": sha256}}
    values["task"]["skip_bad_rows"] = True
    run_dir = tune(tmp_path / "run", values, "steps=1")
    records = json.loads((run_dir / "data.json").read_text())
    assert {name: list(splits) for name, splits in records.items()} == {
        "foods": ["train", "validation", "test"],
        "sides": ["train", "validation", "test"],
    }
    found = records["foods"]["train"]
    assert (found["origin"], found["sha256"], found["revision"]) == ("train.jsonl", sha256, None)
    assert (found["num_rows"], found["num_examples"], found["num_bad"]) == (152, 150, 2)
    assert "Line 151 of train.jsonl" in found["bad"][0]
    assert "Line 152 of train.jsonl" in found["bad"][1]
    whole = load_task(check_values(TuneConfig, copy.deepcopy(mixed), []).task)
    assert found["examples_sha256"] == whole.digests["train"]

    values["task"]["source"]["sha256"] = {"validation": sha256}
    with pytest.raises(DataError) as refused:
        tune(tmp_path / "other", values)
    assert f"task.source.sha256.validation is {sha256}" in str(refused.value)
    actual = hashlib.sha256((tiny_data / "validation.jsonl").read_bytes()).hexdigest()
    assert f"validation.jsonl has sha256 {actual}" in str(refused.value)


def test_a_backbone_that_reads_bytes_needs_no_vocabulary_file(
    tiny_data: Path, tmp_path: Path, said: Said
) -> None:
    """ByT5's; a prompt is tuned and inspected. Without the tokenizer's name it is refused."""
    folder = save_model(make_t5(384), tmp_path / "byt5")
    ByT5Tokenizer().save_pretrained(folder)
    values = runs.tiny_recipe(folder, tiny_data) | {"steps": 2}
    for initialisation in ("class_labels", "sampled_vocabulary"):
        values["prompt"] |= {"initialisation": initialisation}
        run_dir = tune(tmp_path / initialisation, values)
        assert "score" in best_of(run_dir)
    code, shown, _ = said(
        inspect.main, run_dir / "prompt" / "best.safetensors", "--backbone", folder
    )
    assert code == 0, shown
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(BackboneError, match="No tokenizer in"):
        load_tokenizer(folder)


NO_TOKEN = "\x7f"


def test_rows_without_a_token_are_left_out_and_counted_or_named(
    mixed: Recipe, tiny_data: Path, sides: Path, tmp_path: Path, said: Said
) -> None:
    """In the task, in a mixture's and in evaluate, of texts and of answers."""
    values = copy.deepcopy(mixed)
    for name, folder, label in ("task", tiny_data, "apple"), ("mixture", sides, "milk"):
        shutil.copytree(folder, tmp_path / name)
        for split in ("train", "validation"):
            with (tmp_path / name / f"{split}.jsonl").open("a") as file:
                file.write("\n" + json.dumps({"text": NO_TOKEN, "label": label}) + "\n")
    foods = runs.task("foods", tmp_path / "task", runs.ANSWERS)
    other = runs.task("sides", tmp_path / "mixture", runs.SIDES)
    values |= {"task": foods, "mixture": {"tasks": [other]}}
    told = r"Line 152 of train.jsonl: its text .* has no token in the vocabulary .*skip_bad_rows"
    with pytest.raises(DataError, match=told):
        tune(tmp_path / "run", values)

    foods["skip_bad_rows"] = True
    with pytest.raises(DataError, match=told):  # that of the mixture
        tune(tmp_path / "run", values)
    other["skip_bad_rows"] = True
    run_dir = tune(tmp_path / "run", values)
    for record in json.loads((run_dir / "data.json").read_text()).values():
        counts = {n: (r["num_rows"], r["num_examples"], r["num_bad"]) for n, r in record.items()}
        assert counts == {"train": (151, 150, 1), "validation": (22, 21, 1), "test": (21, 21, 0)}
        assert "Line 152 of train.jsonl" in record["train"]["bad"][0]
    plain = tune(tmp_path / "plain", mixed)
    assert [best_of(d)["score"] for d in (run_dir, plain)] == [best_of(plain)["score"]] * 2
    assert runs.metrics_without_time(run_dir) == runs.metrics_without_time(plain)

    scoring: list[Any] = ["--prompt", run_dir / "prompt" / "best.safetensors"]
    scoring += ["--output", tmp_path / "scored", "--split", "validation"]
    code, *rest = said(evaluate.main, *scoring, "--set", "task.skip_bad_rows=false")
    assert code == 2
    assert "Line 23 of validation.jsonl" in "".join(rest)
    assert said(evaluate.main, *scoring)[0] == 0
    result = read_result(tmp_path / "scored" / "results.json")
    assert (result.data["num_examples"], result.data["num_bad"]) == (21, 1)

    answers = {"label_field": "text", "input_template": "{label}", "metrics": ["squad"]}
    texts = runs.task("texts", tmp_path / "mixture", {}, **answers)
    with pytest.raises(DataError, match=r"Line 152 .*: its answer .* has no token"):
        tune(tmp_path / "texts", {**values, "mixture": {}, "task": texts})
