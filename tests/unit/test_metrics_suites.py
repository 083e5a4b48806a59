"""Scores of benchmarks, and the results they are made of."""

import hashlib
import json
from pathlib import Path

import pytest

from softprompt_dist import tasks
from softprompt_dist.data.catalogue.registry import CATALOGUE
from softprompt_dist.errors import DataError
from softprompt_dist.identity import Identity
from softprompt_dist.metrics.results import (
    EvaluationResult,
    prompt_source,
    read_result,
    score_fields,
    write_result,
)
from softprompt_dist.metrics.score_report import score_report, scores_by_task
from softprompt_dist.metrics.scores import measure
from softprompt_dist.metrics.suites import SUITES, suite_score
from tests.answers import LABELS, answers_for

SUPERGLUE = dict(zip(SUITES["superglue"].members, range(60, 76, 2), strict=True))


def test_the_score_is_the_mean_over_tasks():
    score = suite_score("superglue", {**SUPERGLUE, "sst2": 0.0})
    assert score.score == 67.0
    assert str(score) == "SuperGLUE score: 67.0 (mean of 8 tasks)"


def test_a_missing_task_is_named():
    scores = {task: score for task, score in SUPERGLUE.items() if task not in ("copa", "wsc")}
    with pytest.raises(DataError, match=r"8 tasks, but .* no results of copa, wsc\..*--partial"):
        suite_score("superglue", scores)
    partial = suite_score("superglue", scores, partial=True)
    assert partial.score == pytest.approx(sum(scores.values()) / 6)
    assert str(partial) == "SuperGLUE score: 66.3, partial (6 of 8; without copa, wsc)"


def test_nothing_has_no_mean():
    with pytest.raises(DataError, match="no results of boolq, cb"):
        suite_score("superglue", {}, partial=True)


def test_mnli_counts_once():
    scores = {task: 50.0 for task in SUITES["glue"].members} | {"mnli": 80.0}
    assert suite_score("glue", scores).score == pytest.approx((8 * 50 + 65) / 9)
    del scores["mnli_mismatched"]
    partial = suite_score("glue", scores, partial=True)
    assert (partial.score, partial.missing) == (50.0, ("mnli",))


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_the_tasks_that_the_catalogue_has_of_it(suite):
    members = {task.name for task in CATALOGUE.values() if task.suite == suite}
    assert set(SUITES[suite].members) == members


@pytest.fixture
def result(tmp_path):
    prompt = tmp_path / "best.safetensors"
    prompt.write_bytes(b"prompt")
    scores = measure(["f1", "accuracy"], answers_for("f1", 40), LABELS[:2])
    return EvaluationResult.model_validate(
        {
            **score_fields(scores),
            "task": "mrpc",
            "split": "validation",
            "metrics": ("f1", "accuracy"),
            "method": "greedy",
            "prompt": prompt_source(prompt),
            "backbone": "t5",
            "version": "0",
        }
    )


def test_a_result_is_read_as_it_was_written(tmp_path, result):
    write_result(tmp_path / "results.json", result)
    assert read_result(tmp_path) == read_result(tmp_path / "results.json") == result
    assert result.prompt.sha256 == hashlib.sha256(b"prompt").hexdigest()
    assert result.num_invalid == sum(result.invalid.values()) > 0


def test_what_is_missing_or_wrong_in_a_result_is_named(tmp_path, result):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match=r"results\.json cannot be read \(No such file"):
        read_result(tmp_path)
    path.write_text("{'a'")
    with pytest.raises(DataError, match="no result of an evaluation: Invalid JSON"):
        read_result(tmp_path)
    content = json.loads(result.model_dump_json())
    del content["split"]
    content["score"] = 170
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="split: Field required; score: .*less than or equal"):
        read_result(path)
    path.write_text(json.dumps({"rows": [], "verdicts": []}))
    with pytest.raises(DataError, match="task: Field required; .*; and [0-9]+ more"):
        read_result(path)


def test_results_of_a_benchmark_belong_together(result):
    first, second = Path("a.json"), Path("b.json")
    other = result.model_copy(update={"task": "qqp", "score": 10.0})
    assert scores_by_task({first: result, second: other}) == {"mrpc": result.score, "qqp": 10.0}
    with pytest.raises(DataError, match=r"a\.json and b\.json both hold mrpc"):
        scores_by_task({first: result, second: result})
    with pytest.raises(DataError, match=r"a\.json was scored on validation, but b\.json on test"):
        scores_by_task({first: result, second: other.model_copy(update={"split": "test"})})
    here = result.model_copy(update={"identity": Identity("t5", "aa", dtype="fp32")})
    there = other.model_copy(update={"identity": Identity("copy", "aa", dtype="bf16")})
    assert scores_by_task({first: here, second: there}).keys() == {"mrpc", "qqp"}
    there = other.model_copy(update={"identity": Identity("t5", "bb")})
    with pytest.raises(DataError, match=r"a\.json and b\.json .*weights: aa there, bb here"):
        scores_by_task({first: here, second: there})


def write_results(folder, result, tasks):
    for task, score in tasks.items():
        (folder / task).mkdir(parents=True)
        changed = result.model_copy(update={"task": task, "score": score})
        write_result(folder / task / "results.json", changed)


def test_a_folder_of_results_makes_a_benchmark(tmp_path, result):
    write_results(tmp_path, result, SUPERGLUE)
    report = score_report([tmp_path])
    assert report.endswith("\n\nSuperGLUE score: 67.0 (mean of 8 tasks)")
    assert "GLUE score" not in report.replace("SuperGLUE score", "")
    boolq = next(line for line in report.splitlines() if line.startswith("| boolq"))
    cells = [cell.strip() for cell in boolq.strip("|").split("|")]
    low, high = result.score_interval_95
    values = f"f1 {result.values['f1']:.1f}, accuracy {result.values['accuracy']:.1f}"
    assert cells == [
        "boolq",
        "validation",
        "40",
        "greedy",
        values,
        "60.0",
        f"{low:.1f} to {high:.1f}",
        str(result.num_invalid),
    ]


def test_a_part_of_a_benchmark_has_no_score_unless_asked_for(tmp_path, result):
    write_results(tmp_path, result, {"boolq": 60.0, "cb": 70.0, "sst2": 90.0})
    paths = [tmp_path / task for task in ("boolq", "cb", "sst2")]
    report = score_report(paths)
    assert "SuperGLUE has no score yet: it is the mean over 8 tasks, but" in report
    assert "\nGLUE has no score yet" in report
    report = score_report(paths, partial=True)
    assert "SuperGLUE score: 65.0, partial (2 of 8; without copa, multirc," in report
    assert "GLUE score: 90.0, partial (1 of 9;" in report


def test_tasks_of_no_benchmark_stand_alone(tmp_path, result):
    write_results(tmp_path, result, {"mine": 60.0})
    assert "score:" not in score_report([tmp_path])
    with pytest.raises(DataError, match="named twice"):
        score_report([tmp_path, tmp_path / "mine" / "results.json"])
    with pytest.raises(DataError, match="cannot be read"):
        score_report([tmp_path / "mine" / "nothing"])


def test_the_verb_prints_the_table_and_the_score(tmp_path, result, capsys):
    write_results(tmp_path, result, {"boolq": 60.0, "cb": 70.0})
    tasks.main(["score", str(tmp_path / "boolq"), str(tmp_path / "cb"), "--partial"])
    printed = capsys.readouterr().out
    assert printed.startswith("| task  | ")
    assert "SuperGLUE score: 65.0, partial (2 of 8;" in printed
    with pytest.raises(DataError, match="cannot be read"):
        tasks.main(["score", str(tmp_path / "rte")])
