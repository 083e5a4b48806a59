"""`softprompt evaluate`: a prompt on other tasks and other rows, good ones and bad."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist import evaluate, tasks
from softprompt_dist.config import TuneConfig
from softprompt_dist.metrics.results import read_result
from softprompt_dist.recipe import check_values
from softprompt_dist.run import session
from tests import runs
from tests.messages import Outcome, Said, assert_message

pytestmark = pytest.mark.usefixtures("lone_process")
Row = dict[str, Any]


def boolq_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows as the official files have them."""
    return [
        {"question": f"they saw {n}", "passage": row["text"], "label": n % 3 == 0, "idx": n}
        for n, row in enumerate(runs.make_rows(count, seed))
    ]


@pytest.fixture(scope="module")
def prompt(lively_t5: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned on the foods for two steps; answers differ from row to row."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    values = runs.tiny_recipe(lively_t5, tiny_data)
    values |= {"steps": 2, "run_directory": str(run_dir), "optimizer": {"learning_rate": 2.0}}
    # What is tuned or scored besides must not stand in the way of another task.
    values["transfer"] = [{"task": runs.task("boolq", tiny_data, runs.ANSWERS, ["test"])}]
    session.train(check_values(TuneConfig, values, []))
    return run_dir / "prompt" / "best.safetensors"


@pytest.fixture
def boolq(said: Said, prompt: Path) -> Any:
    """`boolq(data, *options)`: what evaluate says of a validation split of BoolQ."""

    def run(data: Path, *options: str | Path, split: str = "validation") -> Outcome:
        arguments = ["--prompt", prompt, "--task", "boolq", "--split", split, "--data", data]
        return said(evaluate.main, *arguments, *options)

    return run


def predictions(folder: Path) -> dict[str, Row]:
    """id -> what was answered."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines)
    return rows


def test_rows_of_a_file_are_answered_as_the_task_says(
    boolq: Any, said: Said, prompt: Path, tmp_path: Path
) -> None:
    rows = boolq_rows(30)
    data = runs.write_rows(tmp_path / "mine.jsonl", rows)
    code, out, _ = boolq(data, "--output", tmp_path / "boolq")
    assert code == 0
    assert out.startswith("boolq, validation\n")
    found = predictions(tmp_path / "boolq")
    assert set(found) == {str(n) for n in range(30)}
    assert {row["correct"] for row in found.values()} == {True, False}
    for row in rows:
        answered = found[str(row["idx"])]
        assert answered["input"] == f"passage: {row['passage']} question: {row['question']}"
        assert answered["target"] == str(row["label"])
        assert answered["correct"] == (answered["prediction"] == answered["target"])
        scores = answered["label_scores"]
        assert set(scores) == {"False", "True"}
        assert answered["prediction"] == max(scores, key=scores.__getitem__)
    result = read_result(tmp_path / "boolq")
    assert (result.task, result.split, result.num_answers) == ("boolq", "validation", 30)
    right = sum(row["correct"] for row in found.values())
    assert result.values == {"accuracy": pytest.approx(100 * right / 30)}
    assert f"{result.score:.1f} (" in out
    assert result.prompt is not None
    assert result.prompt.file == str(prompt)
    assert result.batch_tokens == 256
    assert result.others == {}  # there is no train split to learn a floor from
    names = {path.name for path in (tmp_path / "boolq").iterdir()}
    assert names == {"report.md", "results.json", "predictions.jsonl", "confusion.png"}

    code, out, _ = said(tasks.main, "score", tmp_path / "boolq")
    assert code == 0
    assert f"{result.score:.1f}" in next(x for x in out.splitlines() if "boolq" in x)


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_superglue_as_it_is_handed_out(boolq: Any, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "BoolQ"
    for name, count in {"train": 12, "val": 7}.items():
        runs.write_rows(folder / f"{name}.jsonl", boolq_rows(count, seed=count))
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in boolq_rows(3)]
    runs.write_rows(folder / "test.jsonl", unlabelled)
    data = tmp_path
    if layout == "zip":
        data = tmp_path / "BoolQ.zip"
        with zipfile.ZipFile(data, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, f"BoolQ/{file.name}")
        shutil.rmtree(folder)
    output = tmp_path / "out" / layout
    assert boolq(data, "--output", output)[0] == 0
    result = read_result(output)
    assert result.num_answers == 7
    assert set(result.others) == {"majority class", "naive Bayes"}
    assert result.others["majority class"]["accuracy"] == pytest.approx(100 * 4 / 7)

    refused = boolq(data, split="test")
    assert_message(
        refused, "Split 'test' has no labels", "none of the 3 rows", "test.jsonl", "predict"
    )


def test_a_fair_sample_is_the_same_whatever_the_order(boolq: Any, tmp_path: Path) -> None:
    rows = boolq_rows(12)
    found = []
    for order, name in ((rows, "a"), (rows[::-1], "b")):
        data = runs.write_rows(tmp_path / f"{name}.jsonl", order)
        assert boolq(data, "--max-examples", "5", "--output", tmp_path / name)[0] == 0
        found.append(predictions(tmp_path / name))
    assert len(found[0]) == 5
    assert found[0] == found[1]
    assert set(found[0]) != {"0", "1", "2", "3", "4"}


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_sample_has_at_least_one_row(said: Said, prompt: Path, number: str) -> None:
    outcome = said(evaluate.main, "--prompt", prompt, "--max-examples", number)
    assert_message(outcome, "--max-examples", number)


def test_a_prompt_for_other_answers_is_warned_of(
    boolq: Any,
    said: Said,
    prompt: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = runs.write_rows(tmp_path / "mine.jsonl", boolq_rows(2))
    assert boolq(data)[0] == 0
    assert "The prompt was tuned for foods (own: fish, fruit, root)" in caplog.text
    assert "boolq" in caplog.text
    caplog.clear()
    assert said(evaluate.main, "--prompt", prompt, "--max-examples", "2")[0] == 0
    assert "was tuned for" not in caplog.text


def test_free_text_is_generated_and_cannot_be_ranked(
    said: Said, prompt: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": f"who saw {n}?", "context": "the old river", "answers": ["the river"], "id": n}
        for n in range(3)
    ]
    data = runs.write_rows(tmp_path / "mine.jsonl", rows)
    arguments = ["--prompt", prompt, "--task", "squad", "--split", "validation", "--data", data]
    for method in ([], ["--method", "rank"]):  # the run's own is rank, too
        refused = said(evaluate.main, *arguments, *method)
        assert_message(refused, "'rank'", "'squad' are free text", "evaluation.method=greedy")
    code, out, _ = said(
        evaluate.main, *arguments, "--method", "greedy", "--output", tmp_path / "out"
    )
    assert code == 0
    assert set(read_result(tmp_path / "out").values) == {"em", "f1"}
    assert not (tmp_path / "out" / "confusion.png").exists()


def test_a_broken_line_is_named_or_counted(
    boolq: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = runs.write_rows(tmp_path / "mine.jsonl", boolq_rows(4))
    with data.open("a") as file:
        file.write('{"question": "is it",\n')
        file.write('{"question": "they saw", "passage": null, "label": true, "idx": 9}\n')
    assert_message(boolq(data), "Line 5 of mine.jsonl", "Line 6 of mine.jsonl", "skip_bad_rows")
    assert boolq(data, "--skip-bad-rows", "--output", tmp_path / "out")[0] == 0
    assert "2 of 6 rows of mine.jsonl cannot be used and are left out" in caplog.text
    assert read_result(tmp_path / "out").num_answers == 4


def test_rows_that_cannot_be_scored(boolq: Any, tmp_path: Path) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in boolq_rows(3)]
    twice = [*boolq_rows(3), boolq_rows(3)[1]]
    no_question = [{"passage": "the river", "label": True, "idx": 0}]
    cases: dict[str, tuple[list[Row], list[str]]] = {
        "empty": ([], ["empty.jsonl"]),
        "unlabelled": (unlabelled, ["Split 'validation' has no labels", "unlabelled.jsonl"]),
        "twice": (twice, ["id 1", "lines 2 and 4 of twice.jsonl"]),
        "short": (no_question, ["ine 1 of short.jsonl", "question"]),
    }
    for name, (rows, parts) in cases.items():
        data = runs.write_rows(tmp_path / f"{name}.jsonl", rows)
        assert_message(boolq(data), *parts)
    assert_message(boolq(tmp_path / "none.jsonl"), tmp_path / "none.jsonl")


def test_a_task_that_is_mistyped(said: Said, prompt: Path) -> None:
    outcome = said(evaluate.main, "--prompt", prompt, "--task", "bolq")
    assert_message(outcome, "'bolq'", "Did you mean 'boolq'?")


def test_other_rows_for_the_runs_own_task(said: Said, prompt: Path, tmp_path: Path) -> None:
    data = runs.write_rows(tmp_path / "more.jsonl", runs.make_rows(9, seed=77))
    code, out, _ = said(
        evaluate.main, "--prompt", prompt, "--data", data, "--output", tmp_path / "out"
    )
    assert code == 0
    assert out.startswith("foods, test\n")
    result = read_result(tmp_path / "out")
    assert result.num_answers == 9
    assert set(result.others) == {"majority class", "naive Bayes"}  # from the run's train
    assert result.data["origin"] == "more.jsonl"
    assert result.data["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()


def test_a_prompt_of_another_length_than_the_recipes(
    said: Said, prompt: Path, tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """What counts against the backbone's positions is the prompt that is scored."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 70}))
    values = runs.tiny_recipe(folder, tiny_data) | {"prompt": {"prompt_length": 90}}
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", values)
    code, out, _ = said(
        evaluate.main, "--prompt", prompt, "--recipe", recipe, "--force", "--max-examples", "2"
    )
    assert code == 0
    assert "tuned prompt" in out


HANGS = """
import sys, time
from softprompt_dist import evaluate, predict
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.run.scoring import Scorer
answer, calls = Scorer._predict_batch, iter(range(1000))
def answer_two(*arguments):
    while next(calls) >= 2:
        time.sleep(600)
    return answer(*arguments)
Scorer._predict_batch = answer_two
run_verb({"evaluate": evaluate, "predict": predict}[sys.argv[1]].main, sys.argv[2:])
"""


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_collective_that_hangs_ends_with_its_stacks(
    prompt: Path, tiny_data: Path, tmp_path: Path, verb: str
) -> None:
    output = ["--output", tmp_path] if verb == "evaluate" else ["--output", tmp_path / "o.jsonl"]
    rows = [] if verb == "evaluate" else ["--input", tiny_data / "test.jsonl"]
    limits = ["--set", "health.step_timeout_seconds=1", "--set", "evaluation.batch_tokens=40"]
    done = subprocess.run(
        [sys.executable, "-c", HANGS, verb, "--prompt", prompt, *output, *rows, *limits],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    what = "scoring the prompt, foods test" if verb == "evaluate" else "predicting"
    assert f"error: Rank 0 made no progress for 1 s while {what}." in done.stderr
    assert done.returncode == 5
    stacks = tmp_path / "stacks" / "rank-0.txt"
    said = stacks.read_text() if verb == "evaluate" else done.stderr
    assert " in answer_two" in said
