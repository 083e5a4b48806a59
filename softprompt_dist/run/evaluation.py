"""Scoring a prompt file, in a world that was joined already."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import MachineError, PromptFileError
from softprompt_dist.identity import Accept, Identity
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.metrics.results import prompt_source
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.file import PromptMetadata, load_prompt
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.evaluation_report import EvaluationFiles, screen_text, write_evaluation
from softprompt_dist.run.judgement import Evaluation, floor_predictions, judge
from softprompt_dist.run.loaded_task import LoadedTask, Split
from softprompt_dist.run.scoring import Prediction
from softprompt_dist.run.tuning import Bench, build_bench
from softprompt_dist.task_config import TaskConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringRequest:
    """Which prompt to score on what."""

    prompt_file: Path
    split: str = "test"
    max_examples: int | None = None
    """Score a fair sample of n."""
    folder: Path | None = None
    """Where report, results, predictions and pictures go."""
    force: bool = False
    """Accept a prompt that was tuned for another backbone."""


def evaluate(
    config: TuneConfig, request: ScoringRequest, ds_config: dict[str, Any] | None = None
) -> list[Prediction]:
    """All ranks: predictions of a prompt on a split; rank 0 prints the scores beside their floors.

    Raises:
        PromptFileError: the file is unreadable, or belongs to another backbone and not `force`.
        MachineError: the folder cannot be made.
        SoftpromptError: see `build_bench`.
    """
    # Before any weight is read.
    _, metadata = ranks.together(lambda: load_prompt(request.prompt_file))
    ranks.on_main(lambda: _make_folder(request.folder))
    config = _with_prompt_length(config, metadata.prompt_length)
    accept = accept_of(request.prompt_file, force=request.force)
    bench = build_bench(config, ds_config, splits=[request.split], accept=accept)
    task = bench.task
    if ranks.is_main():
        warn_of_other_family(metadata, task.name, task.data.family)
        warn_of_other_prefix(metadata, task.config)
    prompt_PD = ranks.together(lambda: prompt_for(bench, request.prompt_file))
    prompt = SoftPrompt(prompt_PD).to(ranks.device())
    answered = answer(bench, prompt, task, request.split, request.max_examples)

    def show() -> None:
        asked = evaluation_of(bench, answered, request.prompt_file)
        judgement = judge(asked)
        print(f"{task.name}, {request.split}\n{screen_text(asked, judgement)}", flush=True)
        if request.folder is not None:
            files = EvaluationFiles.below(request.folder)
            write_evaluation(files, asked, judgement)
            print(f"Report: {files.report}", flush=True)

    ranks.on_main(show)
    return list(answered.predictions)


@dataclass(frozen=True)
class Answered:
    """A split of a task, and what a prompt answered to it."""

    task: LoadedTask
    split_name: str
    split: Split
    predictions: Sequence[Prediction]


def answer(  # noqa: PLR0913 - whom, what, and how it is called
    bench: Bench,
    prompt: SoftPrompt,
    task: LoadedTask,
    split_name: str,
    count: int | None = None,
    *,
    who: str = "the prompt",
) -> Answered:
    """All ranks: have a prompt answer a split, or a fair sample of `count` examples."""
    split = task.splits[split_name].sample(count)
    what = f"scoring {who}, {task.name} {split_name}"
    health = bench.config.health
    with doing(what, health.step_timeout_seconds, first_seconds=health.slow_timeout_seconds):
        return Answered(task, split_name, split, bench.predict(prompt, task, split, what))


def evaluation_of(
    bench: Bench,
    answered: Answered,
    prompt_file: Path,
    others: Mapping[str, Sequence[str]] | None = None,
) -> Evaluation:
    """What was asked and answered, beside the floors and the answers of `others`.

    Raises:
        OSError: the prompt file cannot be read.
    """
    task, texts = answered.task, answered.split.texts
    generated = [prediction.text for prediction in answered.predictions]
    known = {} if answered.split_name == "train" else floor_predictions(task.data, texts)
    floors = {name: [text.strip() for text in found] for name, found in known.items()}
    compared = floors | {name: task.spoken(found) for name, found in (others or {}).items()}
    scores = [prediction.label_scores for prediction in answered.predictions]
    return Evaluation(
        task=task.name,
        split=answered.split_name,
        metrics=task.data.metrics,
        labels=task.labels,
        examples=[dataclasses.replace(e, target_text=e.target_text.strip()) for e in texts],
        predictions=task.spoken(generated),
        method=task.rule.name,
        backbone=bench.identity,
        batch_tokens=bench.scorer.batch_tokens,
        prompt=prompt_source(prompt_file),
        data=task.data.provenance(answered.split_name),
        others={name: found for name, found in compared.items() if len(found) == len(texts)},
        generated=generated if task.translation else (),
        label_scores=() if task.translation else scores,
    )


def accept_of(prompt_file: Path, *, force: bool) -> Accept:
    """Accepts the backbone that the prompt of a file was tuned for; with `force` any, warning."""

    def accept(here: Identity) -> None:
        load_prompt(prompt_file, backbone=here, force=force)

    return accept


def prompt_for(bench: Bench, prompt_file: Path) -> Tensor:
    """prompt_PD of a file, which must be as wide as the bench's backbone.

    Raises:
        PromptFileError: it has another width.
    """
    prompt_PD, _ = load_prompt(prompt_file)
    if prompt_PD.shape[1] != bench.backbone.d_model:
        raise PromptFileError(
            f"{prompt_file} holds a prompt of {prompt_PD.shape[0]} x {prompt_PD.shape[1]}, "
            f"but this backbone's width is {bench.backbone.d_model}, which --force cannot change. "
            "Use the backbone it was tuned for."
        )
    return prompt_PD


def warn_of_other_family(metadata: PromptMetadata, task: str, family: str) -> None:
    """Say so where a prompt was tuned for other kinds of answers than those of `task`."""
    if metadata.task_family and family not in metadata.families:
        log.warning(
            "The prompt was tuned for %s (%s); answers of %s are of another kind (%s), so "
            "they say little.",
            metadata.task,
            metadata.task_family,
            task,
            family,
        )


def warn_of_other_prefix(metadata: PromptMetadata, task: TaskConfig) -> None:
    """Say so where a prompt was tuned to begin answers otherwise than `task` says."""
    if task.target_prefix not in metadata.target_prefixes:
        log.warning(
            "The prompt was tuned with target_prefix %s, but that of %s is %s, so answers say "
            "little. Set task.target_prefix to what it was tuned with.",
            " or ".join(prefix or "null" for prefix in metadata.target_prefixes),
            task.name,
            task.target_prefix or "null",
        )


def _with_prompt_length(config: TuneConfig, prompt_length: int) -> TuneConfig:
    prompt = config.prompt.model_copy(update={"prompt_length": prompt_length})
    return config.model_copy(update={"prompt": prompt})


def _make_folder(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"The folder {folder} cannot be made: {error.strerror}. Choose another one (--output)."
        ) from error
