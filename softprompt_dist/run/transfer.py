"""Zero-shot transfer: a tuned prompt on tasks that it was not tuned for (the paper's section 5)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.data.tasks import TaskData
from softprompt_dist.durable import replace_file
from softprompt_dist.errors import ConfigError
from softprompt_dist.metrics.table import markdown_table
from softprompt_dist.names import name_of
from softprompt_dist.parallel import ranks
from softprompt_dist.run.evaluation_report import evaluation_result
from softprompt_dist.run.judgement import FLOORS, Evaluation, Judgement
from softprompt_dist.run.loaded_task import LoadedTask, TextReader
from softprompt_dist.run.report import interval_text
from softprompt_dist.task_config import TransferConfig


def transfer_target(
    reader: TextReader, tuned: LoadedTask, transfer: TransferConfig, data: TaskData
) -> LoadedTask:
    """All ranks: another task's split, answered in the words of the task `tuned` where they differ.

    Raises:
        SoftpromptError: see `TextReader.load`; or what the prompt answers is no label there.
    """
    target = reader.load(transfer.task, data, [transfer.split], transfer.translate)
    ranks.together(lambda: _check_translation(tuned, target))
    splits = {name: split.sample(transfer.max_examples) for name, split in target.splits.items()}
    if not transfer.translate:  # both tasks have the same words
        return dataclasses.replace(target, splits=splits)
    # A prompt answers with the labels that it was tuned on; `translate` says what they mean here.
    rule = tuned.rule
    splits = {
        name: dataclasses.replace(split, max_target_tokens=rule.max_target_tokens)
        for name, split in splits.items()
    }
    return dataclasses.replace(target, splits=splits, rule=rule)


def _check_translation(tuned: LoadedTask, target: LoadedTask) -> None:
    for label, meaning in zip(tuned.labels, target.spoken(tuned.labels), strict=True):
        if target.labels and meaning not in (label, *target.labels):
            raise ConfigError(
                f"transfer: translate makes {meaning!r} of {tuned.name}'s label {label!r}, which "
                f"is no label of {target.name}: {', '.join(target.labels)}. Correct translate."
            )


@dataclass(frozen=True)
class Domain:
    """A task as the tuned prompt answered it."""

    evaluation: Evaluation
    judgement: Judgement
    is_tuned: bool
    """Whether the prompt was tuned for it."""

    @property
    def title(self) -> str:
        """Task and split."""
        return f"{self.evaluation.task}, {self.evaluation.split}"

    @property
    def folder(self) -> str:
        """Where its own report lies, below the run's directory."""
        name = name_of(self.evaluation.task)
        return f"{'tasks' if self.is_tuned else 'transfer'}/{name}-{self.evaluation.split}"

    @property
    def floors(self) -> list[str]:
        """The floors that it was compared with."""
        return [name for name in FLOORS if name in self.judgement.scores]

    @property
    def score(self) -> float:
        """In percent."""
        return self.judgement.subject.score


def transfer_table(domains: Sequence[Domain]) -> str:
    """Markdown table: in-domain first, then each other task with its drop from there in points."""
    home = _home_score(domains)
    rows = []
    for domain in domains:
        subject = domain.judgement.subject
        floor = domain.judgement.scores.get(FLOORS[0])
        rows.append(
            (
                domain.title,
                "tuned for" if domain.is_tuned else "zero-shot",
                "" if floor is None else f"{floor.score:.1f}",
                f"{subject.score:.1f}",
                "" if subject.score_interval is None else interval_text(subject.score_interval),
                "" if domain.is_tuned else f"{home - subject.score:.1f}",
                str(subject.num_answers),
            )
        )
    header = ("task", "", FLOORS[0], "score", "95 % interval", "drop", "n")
    return markdown_table(header, rows)


def write_transfer(path: Path, domains: Sequence[Domain]) -> None:
    """Write the table as Markdown, and all results beside it as JSON.

    Raises:
        OSError: the folder cannot be written.
    """
    home = _home_score(domains)
    title = "Scores of all tasks" if all(d.is_tuned for d in domains) else "Zero-shot transfer"
    text = (
        f"# {title}\n\n{transfer_table(domains)}\n\nScores in percent: the mean of a task's "
        "metrics. The drop is from the mean score of the tasks tuned for, in points; between tasks "
        "with different metrics it compares scores that count differently.\n"
    )
    results = [
        {
            "tuned_for": domain.is_tuned,
            "drop": None if domain.is_tuned else home - domain.score,
            **evaluation_result(domain.evaluation, domain.judgement).model_dump(mode="json"),
        }
        for domain in domains
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
    replace_file(path.with_suffix(".json"), (json.dumps(results, indent=2) + "\n").encode())


def _home_score(domains: Sequence[Domain]) -> float:
    scores = [domain.score for domain in domains if domain.is_tuned]
    return sum(scores) / len(scores)
