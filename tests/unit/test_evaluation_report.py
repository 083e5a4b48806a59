"""What an evaluation writes and says."""

import json

import pytest

from softprompt_dist.data.examples import Example
from softprompt_dist.identity import Identity
from softprompt_dist.metrics.results import PromptSource, read_result
from softprompt_dist.run.evaluation_report import (
    EvaluationFiles,
    invalid_line,
    scores_table,
    screen_text,
    write_evaluation,
)
from softprompt_dist.run.judgement import Evaluation, judge

TARGETS = ["yes", "no"] * 20
GOOD = ["no", "entail", "", "entail", *TARGETS[4:]]


def evaluation(predictions=GOOD, **changes):
    settings = {
        "task": "mrpc",
        "split": "validation",
        "metrics": ("f1", "accuracy"),
        "labels": ("no", "yes"),
        "examples": [Example(f"text {i}", t, f"row {i}") for i, t in enumerate(TARGETS)],
        "predictions": predictions,
        "method": "greedy",
        "backbone": Identity("a T5", "0a1b", {}, {}, "fp32"),
        "prompt": PromptSource(file="best.safetensors", sha256="ab" * 32),
        "others": {"majority class": ["yes"] * 40},
    }
    return Evaluation(**{**settings, **changes})


def written(folder, asked, **pictures):
    files = EvaluationFiles.below(folder)
    result = write_evaluation(files, asked, judge(asked), pictures)
    return files, result


def test_the_subject_stands_below_the_floors_with_intervals_in_percent():
    judgement = judge(evaluation())
    lines = scores_table(judgement.scores).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "f1", "accuracy", "score", "n"]
    assert [row[0] for row in cells[2:]] == ["majority class", "tuned prompt"]
    low, high = judgement.subject.intervals["accuracy"]
    assert cells[3][2] == f"90.0 ({low:.1f} to {high:.1f})"
    assert cells[2][3].startswith("58.3 (")  # F1 of 2 * 20 / (2 * 20 + 20), accuracy 50 %
    assert cells[3][4] == "40"


def test_one_metric_needs_no_score_beside_it():
    judgement = judge(evaluation(metrics=("accuracy",)))
    assert scores_table(judgement.scores).splitlines()[0].split() == [
        "|",
        "|",
        "accuracy",
        "|",
        "n",
        "|",
    ]


def test_the_verdict_is_that_of_the_same_rows():
    (verdict,) = judge(evaluation(metrics=("accuracy",))).verdicts
    assert verdict.startswith(
        "The tuned prompt (90.0) is above majority class (50.0) by 40.0 points (95 % interval "
    )
    others = {"untuned prompt": [*GOOD[:-1], "yes"], "itself": GOOD}
    chance, equal = judge(evaluation(metrics=("accuracy",), others=others)).verdicts
    assert chance.endswith("by 2.5 points, which may be chance at this n.")
    assert equal == "The tuned prompt (90.0) is equal to itself (90.0)."


def test_invalid_answers_are_told():
    asked = evaluation()
    line = invalid_line(asked, judge(asked).subject)
    assert line == "3 of 40 answers are no label (7.5 %): 'entail' 2, '' 1"
    assert line in screen_text(asked, judge(asked))
    many = evaluation([f"text {i} {'long ' * 4 * i}" for i in range(40)])
    line = invalid_line(many, judge(many).subject)
    assert line.startswith("40 of 40 answers are no label (100.0 %): 'text 0 ' 1, 'text 1 long ")
    assert "'text 2 long long long long long long lo…' 1" in line
    assert line.endswith(" and 35 other texts")
    perfect = evaluation(TARGETS)
    assert invalid_line(perfect, judge(perfect).subject) == ""


def test_numbers_are_no_classes(tmp_path):
    examples = [Example("text", f"{i / 10:.1f}", str(i)) for i in range(40)]
    asked = evaluation(
        [*(example.target_text for example in examples[1:]), "five"],
        examples=examples,
        metrics=("pearson_corrcoef",),
        labels=tuple(example.target_text for example in examples),
        others={},
    )
    assert invalid_line(asked, judge(asked).subject) == (
        "1 of 40 answers is no number (2.5 %): 'five' 1"
    )
    files, _ = written(tmp_path, asked)
    assert not files.confusion.exists()
    assert "## Classes" not in files.report.read_text()
    assert "correct" not in json.loads(files.predictions.read_text().splitlines()[0])


def test_the_report_is_for_people(tmp_path):
    curve = tmp_path / "plots" / "curve.png"
    files, _ = written(tmp_path, evaluation(), **{"Learning curve": curve})
    report = files.report.read_text()
    assert report.startswith("# mrpc, validation\n\n| ")
    assert screen_text(evaluation(), judge(evaluation())) in report
    made_by = f"Answers by greedy with a T5 ({evaluation().backbone.digest[:12]}, fp32)."
    assert f"{made_by} Prompt: best.safetensors (sha256 abababababababab…)." in report
    assert "| (invalid) |" in report
    assert "![Learning curve](plots/curve.png)\n\n![Confusion matrix](confusion.png)" in report
    assert "| 'entail' | 2 |" in report
    assert files.confusion.read_bytes().startswith(b"\x89PNG")


def test_the_results_are_for_programs(tmp_path):
    files, result = written(tmp_path / "new" / "folder", evaluation())
    assert read_result(files.results) == result
    assert result.values["accuracy"] == 90.0
    assert result.score == pytest.approx(sum(result.values.values()) / 2)
    assert result.invalid == {"entail": 2, "": 1}
    assert result.others["majority class"]["accuracy"] == 50.0
    assert len(result.verdicts) == 1


def test_every_row_is_written_with_what_was_answered(tmp_path):
    asked = evaluation(
        generated=["<extra_id_0> " + text for text in GOOD],
        label_scores=[(-1.0, -2.5)] * 39 + [None],
    )
    files, _ = written(tmp_path, asked)
    rows = [json.loads(line) for line in files.predictions.read_text().splitlines()]
    assert rows[0] == {
        "id": "row 0",
        "input": "text 0",
        "target": "yes",
        "prediction": "no",
        "correct": False,
        "generated": "<extra_id_0> no",
        "label_scores": {"no": -1.0, "yes": -2.5},
    }
    assert rows[4]["correct"] is True
    assert "label_scores" not in rows[39]
    assert len(rows) == 40


def test_free_text_has_neither_classes_nor_invalid_answers(tmp_path):
    facts = {"answers": ["a barn", "the red barn"]}
    asked = evaluation(
        ["The barn!", "cow"],
        examples=[Example("where?", "a barn", str(i), facts) for i in range(2)],
        metrics=("squad",),
        labels=(),
        others={},
    )
    files, result = written(tmp_path, asked)
    assert result.values == {"em": 50.0, "f1": 50.0}
    assert not files.confusion.exists()
    assert [json.loads(line)["correct"] for line in files.predictions.read_text().splitlines()] == [
        True,
        False,
    ]
