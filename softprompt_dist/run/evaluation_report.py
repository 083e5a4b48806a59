"""What an evaluation found, for the screen, for people and for programs.

folder/report.md           scores beside their floors, classes, answers that are none
       results.json        the same for programs, see `softprompt_dist.metrics.results`
       predictions.jsonl   every row with what the prompt answered
       confusion.png       where there are labels
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from softprompt_dist import __version__
from softprompt_dist.durable import replace_file
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.classes import class_scores, class_table, confusion_counts
from softprompt_dist.metrics.confusion_plot import MAX_LABELS, plot_confusion
from softprompt_dist.metrics.metric import Metric
from softprompt_dist.metrics.registry import find_metrics
from softprompt_dist.metrics.results import (
    FILE_NAME,
    EvaluationResult,
    score_fields,
    write_result,
)
from softprompt_dist.metrics.scores import Scores
from softprompt_dist.metrics.table import markdown_table
from softprompt_dist.run.judgement import Evaluation, Judgement, answers_to
from softprompt_dist.run.report import interval_text

_SHOWN_ON_SCREEN, _SHOWN_IN_REPORT = 5, 20


@dataclass(frozen=True)
class EvaluationFiles:
    """Where an evaluation is written."""

    report: Path
    results: Path
    predictions: Path
    confusion: Path

    @classmethod
    def below(cls, folder: Path) -> EvaluationFiles:
        """All of them in `folder`."""
        names = ("report.md", FILE_NAME, "predictions.jsonl", "confusion.png")
        return cls(*(folder / name for name in names))


def scores_table(scores: Mapping[str, Scores]) -> str:
    """Markdown table: a row for each name; values, the task's score, their 95 % intervals, n."""
    names = list(next(iter(scores.values())).values)
    header = ["", *names, *(["score"] if len(names) > 1 else []), "n"]
    rows = []
    for name, each in scores.items():
        cells = [_with_interval(each.values[value], each.intervals.get(value)) for value in names]
        if len(names) > 1:
            cells.append(_with_interval(each.score, each.score_interval))
        rows.append((name, *cells, str(each.num_answers)))
    return markdown_table(header, rows)


def invalid_line(evaluation: Evaluation, scores: Scores) -> str:
    """How many answers are none, and which most often; empty where all are answers."""
    if not scores.invalid:
        return ""
    share = 100 * scores.num_invalid / scores.num_answers
    shown = ", ".join(_counted(scores.invalid, _SHOWN_ON_SCREEN))
    rest = len(scores.invalid) - _SHOWN_ON_SCREEN
    more = f" and {rest} other texts" if rest > 0 else ""
    are = "is" if scores.num_invalid == 1 else "are"
    kind = _kind_of_answer(evaluation)
    return (
        f"{scores.num_invalid} of {scores.num_answers} answers {are} no {kind} ({share:.1f} %): "
        f"{shown}{more}"
    )


def screen_text(evaluation: Evaluation, judgement: Judgement) -> str:
    """Table, comparisons and invalid answers."""
    verdicts = "\n".join(f"- {sentence}" for sentence in judgement.verdicts)
    parts = scores_table(judgement.scores), verdicts, invalid_line(evaluation, judgement.subject)
    return "\n\n".join(filter(None, parts))


def write_evaluation(
    files: EvaluationFiles,
    evaluation: Evaluation,
    judgement: Judgement,
    pictures: Mapping[str, Path] | None = None,
) -> EvaluationResult:
    """Write report, results, predictions and the confusion matrix, each whole.

    Args:
        files: their folders are made.
        evaluation: what was asked and answered.
        judgement: of `judge`.
        pictures: other pictures that the report shows, by what they show.

    Returns:
        What results.json holds.

    Raises:
        OSError: a folder cannot be written.
    """
    for path in (files.report, files.results, files.predictions, files.confusion):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(files.predictions, "".join(_prediction_lines(evaluation)).encode())
    shown = dict(pictures or {})
    if _has_classes(evaluation) and len(evaluation.labels) <= MAX_LABELS:
        answers = answers_to(evaluation.examples, evaluation.predictions)
        counts_LC = confusion_counts(answers, evaluation.labels)
        plot_confusion(counts_LC, evaluation.labels, files.confusion, title=_title(evaluation))
        shown["Confusion matrix"] = files.confusion
    text = _report(evaluation, judgement, {name: _relative(p, files) for name, p in shown.items()})
    replace_file(files.report, text.encode())
    result = evaluation_result(evaluation, judgement)
    write_result(files.results, result)
    return result


def evaluation_result(evaluation: Evaluation, judgement: Judgement) -> EvaluationResult:
    """What results.json holds."""
    others = {name: dict(judgement.scores[name].values) for name in evaluation.others}
    return EvaluationResult.model_validate(
        {
            **score_fields(judgement.subject),
            "task": evaluation.task,
            "split": evaluation.split,
            "metrics": evaluation.metrics,
            "method": evaluation.method,
            "prompt": evaluation.prompt,
            "data": dict(evaluation.data),
            "backbone": evaluation.backbone.path,
            "identity": evaluation.backbone,
            "batch_tokens": evaluation.batch_tokens,
            "version": __version__,
            "others": others,
            "verdicts": judgement.verdicts,
        }
    )


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1f}" if interval is None else f"{value:.1f} ({interval_text(interval)})"


def _counted(invalid: Mapping[str, int], most: int) -> list[str]:
    return [f"{_shortened(text)!r} {count}" for text, count in islice(invalid.items(), most)]


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _has_classes(evaluation: Evaluation) -> bool:
    """Whether answers are labels, not numbers that happen to be of a few values."""
    metrics = find_metrics(evaluation.metrics)
    return bool(evaluation.labels) and any(metric.labels != "unused" for metric in metrics)


def _kind_of_answer(evaluation: Evaluation) -> str:
    """What the invalid answers are not."""
    metrics = find_metrics(evaluation.metrics)
    return next(metric.answer_kind for metric in metrics if metric.is_invalid is not None)


def _title(evaluation: Evaluation) -> str:
    return f"{evaluation.task}, {evaluation.split}"


def _relative(picture: Path, files: EvaluationFiles) -> str:
    return picture.relative_to(files.report.parent).as_posix()


def _report(evaluation: Evaluation, judgement: Judgement, pictures: Mapping[str, str]) -> str:
    parts = [f"# {_title(evaluation)}", screen_text(evaluation, judgement)]
    parts.append("Percent, with 95 % bootstrap intervals in brackets." + _made_by(evaluation))
    if _has_classes(evaluation):
        answers = answers_to(evaluation.examples, evaluation.predictions)
        counts_LC = confusion_counts(answers, evaluation.labels)
        parts += ["## Classes", class_table(class_scores(counts_LC, evaluation.labels))]
    parts += [f"![{name}]({path})" for name, path in pictures.items()]
    if invalid := judgement.subject.invalid:
        rows = [
            (repr(_shortened(text)), str(count))
            for text, count in islice(invalid.items(), _SHOWN_IN_REPORT)
        ]
        heading = f"## Answers that are no {_kind_of_answer(evaluation)}"
        parts += [heading, markdown_table(("text", "n"), rows)]
        if len(invalid) > len(rows):
            parts.append(f"And {len(invalid) - len(rows)} other texts.")
    return "\n\n".join(parts) + "\n"


def _made_by(evaluation: Evaluation) -> str:
    made = f" Answers by {evaluation.method} with {evaluation.backbone.name}."
    if evaluation.prompt is None:
        return made
    return f"{made} Prompt: {evaluation.prompt.file} (sha256 {evaluation.prompt.sha256[:16]}…)."


def _prediction_lines(evaluation: Evaluation) -> Iterator[str]:
    metrics = find_metrics(evaluation.metrics)
    answers = answers_to(evaluation.examples, evaluation.predictions)
    for index, (example, answer) in enumerate(zip(evaluation.examples, answers, strict=True)):
        row: dict[str, Any] = {
            "id": example.id,
            "input": example.input_text,
            "target": example.target_text,
            "prediction": answer.prediction,
            **_correctness(metrics, answer),
        }
        if evaluation.generated:
            row["generated"] = evaluation.generated[index]
        if evaluation.label_scores and (scores := evaluation.label_scores[index]) is not None:
            row["label_scores"] = dict(zip(evaluation.labels, scores, strict=True))
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _correctness(metrics: Sequence[Metric], answer: Answer) -> dict[str, bool]:
    rules = [metric.is_right for metric in metrics if metric.is_right is not None]
    return {"correct": rules[0](answer)} if rules else {}
