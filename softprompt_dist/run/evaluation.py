"""Scoring a prompt file, in a world that was joined already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.floors import majority_class, naive_bayes
from softprompt_dist.errors import PromptFileError
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.file import load_prompt
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.outcome import count_correct, write_predictions
from softprompt_dist.run.report import ScoreRow, results_table
from softprompt_dist.run.tuning import build_bench


@dataclass(frozen=True)
class ScoringRequest:
    """Which prompt to score on what."""

    prompt_file: Path
    split: str = "test"
    output: Path | None = None
    """Where every row's input, target and prediction go (jsonl)."""
    force: bool = False
    """Accept a prompt that was tuned for another backbone."""


def evaluate(
    config: TuneConfig, request: ScoringRequest, ds_config: dict[str, Any] | None = None
) -> list[str]:
    """All ranks: predictions of a prompt on a split; rank 0 prints the score beside its floors.

    Raises:
        PromptFileError: the file is unreadable, or belongs to another backbone and not `force`.
        SoftpromptError: see `build_bench`.
    """
    ranks.together(lambda: load_prompt(request.prompt_file))  # before any weight is read
    bench = build_bench(config, ds_config)
    prompt_PD = ranks.together(lambda: _prompt_for(bench.backbone, request))
    split = bench.splits[request.split]
    if request.split == "test":
        split = split.sample(config.evaluation.max_test_examples)
    predictions = bench.scorer.predict(SoftPrompt(prompt_PD).to(ranks.device()), split.tokens)

    def show() -> None:
        rows = [
            ScoreRow(name, count_correct(answers, split.texts), len(split.texts))
            for name, answers in (
                ("majority class", majority_class(bench.task, split.texts)),
                ("naive Bayes", naive_bayes(bench.task, split.texts)),
                ("tuned prompt", predictions),
            )
        ]
        print(f"{bench.task.name}, {request.split}\n{results_table(rows)}", flush=True)
        if request.output is not None:
            write_predictions(request.output, split.texts, predictions)

    ranks.on_main(show)
    return predictions


def _prompt_for(backbone: Backbone, request: ScoringRequest) -> Tensor:
    prompt_PD, _ = load_prompt(
        request.prompt_file, backbone_fingerprint=backbone.fingerprint, force=request.force
    )
    if prompt_PD.shape[1] != backbone.d_model:
        raise PromptFileError(
            f"{request.prompt_file} holds a prompt of {prompt_PD.shape[0]} x {prompt_PD.shape[1]}, "
            f"but this backbone's width is {backbone.d_model}, which --force cannot change. Use "
            "the backbone it was tuned for."
        )
    return prompt_PD
