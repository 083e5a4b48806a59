"""Answers of a prompt judged beside those of others: floors, the untuned prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt_dist.data.examples import Example
from softprompt_dist.data.floors import has_floors, majority_class, naive_bayes
from softprompt_dist.data.tasks import TaskData
from softprompt_dist.identity import Identity
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.results import PromptSource
from softprompt_dist.metrics.scores import Scores, compare, measure
from softprompt_dist.progress import counted, phase
from softprompt_dist.run.report import verdict

FLOORS = ("majority class", "naive Bayes")


@dataclass(frozen=True)
class Evaluation:
    """What was asked, and what was answered."""

    task: str
    split: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    """Empty for free text."""
    examples: Sequence[Example]
    predictions: Sequence[str]
    """The texts that are judged, in the order of `examples`."""
    method: str
    """How answers were made, such as `greedy` or `rank`."""
    backbone: Identity
    batch_tokens: int | None = None
    """Positions that each rank scored at a time."""
    prompt: PromptSource | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """Where the split's rows came from; see `TaskData.provenance`."""
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Floors and whatever else answered the same examples -> its predictions."""
    generated: Sequence[str] = ()
    """What the model wrote, where `predictions` were made of it."""
    label_scores: Sequence[tuple[float, ...] | None] = ()
    """Scores of the labels in their order, for each example."""
    subject: str = "tuned prompt"


@dataclass(frozen=True)
class Judgement:
    """Scores of all that answered, the subject last, and how the subject compares."""

    scores: Mapping[str, Scores]
    verdicts: tuple[str, ...]

    @property
    def subject(self) -> Scores:
        """Scores of the subject."""
        return next(reversed(list(self.scores.values())))


def floor_predictions(task: TaskData, examples: Sequence[Example]) -> dict[str, list[str]]:
    """Answers that need no model, by name; none where none can score, or without a train split."""
    if "train" not in task.splits or not has_floors(task.labels, task.metrics):
        return {}
    floors = {FLOORS[0]: majority_class(task, examples)}
    if task.labels:
        with phase("naive Bayes"):
            floors[FLOORS[1]] = naive_bayes(task, examples)
    return floors


def answers_to(examples: Sequence[Example], predictions: Sequence[str]) -> list[Answer]:
    """Each prediction beside its example's target and facts."""
    return [
        Answer(prediction, example.target_text, example.facts)
        for example, prediction in zip(examples, predictions, strict=True)
    ]


def judge(evaluation: Evaluation) -> Judgement:
    """Score the subject and the others, and compare them on the same resamples.

    Raises:
        SoftpromptError: see `measure`.
    """
    names, labels = evaluation.metrics, evaluation.labels
    judged = answers_to(evaluation.examples, evaluation.predictions)
    others = {
        name: answers_to(evaluation.examples, predictions)
        for name, predictions in evaluation.others.items()
    }
    answered = {**others, evaluation.subject: judged}
    scores = {
        name: measure(names, answered[name], labels)
        for name in counted(answered, "bootstrap intervals", "scores")
    }
    subject = (evaluation.subject, scores[evaluation.subject].score)
    intervals = {
        name: compare(names, judged, others[name], labels).interval
        for name in counted(others, "comparing scores", "scores")
    }
    verdicts = tuple(
        verdict(subject, (name, scores[name].score), interval)
        for name, interval in intervals.items()
    )
    return Judgement(scores, verdicts)
