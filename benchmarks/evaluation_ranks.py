"""One variant of the evaluation benchmark, in a process of its own: ours, ours padded, or PEFT.

Answers are compared as token ids: most pieces of a random model's vocabulary have no text.
Axes: B batch, S source tokens, T target tokens, V vocabulary, P prompt, D width.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from benchmarks.memory import PeakMemory
from softprompt_dist.backbone.load import load_backbone, load_tokenizer
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch, TokenExample, tokenise
from softprompt_dist.data.examples import Example
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.scoring import AnswerRule, LabelSet, Prediction, Scorer

LABELS = ("positive", "negative")
Predict = Callable[[Sequence[TokenExample], str], list[Prediction]]


@dataclass
class Work:
    """What every variant is given."""

    settings: Mapping[str, Any]
    tokenizer: Any
    examples: tuple[TokenExample, ...]
    labels: LabelSet
    positions: int = 0
    """Positions that were read so far, with the prompt's and padding."""

    @property
    def max_target_tokens(self) -> int:
        """Tokens of the longest label: where a generated answer ends."""
        return max(map(len, self.labels.ids))

    def initial_prompt(self, d_model: int) -> torch.Tensor:
        """The same random prompt for all variants."""
        shape = (self.settings["prompt_length"], d_model)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5

    def count(self, input_ids_BS: torch.Tensor) -> None:
        """A batch is about to be read."""
        num_rows, length = input_ids_BS.shape
        self.positions += num_rows * (self.settings["prompt_length"] + length)


class IdsAsText:
    """A tokenizer whose text of token ids is their numbers, up to the end of the answer."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.unk_token = self.unk_token_id = None

    def __len__(self) -> int:
        """No id is beyond this vocabulary."""
        return sys.maxsize

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        """Numbers before the first end-of-sequence piece."""
        return [" ".join(map(str, self._answer(list(row)))) for row in rows]

    def _answer(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids


@dataclass(frozen=True)
class CountingScorer(Scorer):
    """Our scorer, counting what it reads."""

    work: Work

    def _collate(self, inputs: Sequence[tuple[int, ...]]) -> TokenBatch:
        batch = super()._collate(inputs)
        self.work.count(batch.input_ids_BS)
        return batch


@dataclass(frozen=True)
class PaddedScorer(CountingScorer):
    """Our scorer, but rows in their given order, in batches of one size, padded to one length."""

    def _batches(
        self, prompt: SoftPrompt, inputs: Collection[tuple[int, ...]], rule: AnswerRule
    ) -> list[list[int]]:
        size, places = self.work.settings["batch_size"], list(range(len(inputs)))
        return [places[start : start + size] for start in places[::size]]

    def _labels_at_a_time(self, prompt: SoftPrompt, lengths: list[int], rule: AnswerRule) -> int:
        return max(1, len(rule.labels.ids))

    def _collate(self, inputs: Sequence[tuple[int, ...]]) -> TokenBatch:
        batch = Scorer._collate(self, inputs)
        missing = self.work.settings["fixed_length"] - batch.input_ids_BS.shape[1]
        pad_id = self.tokenizer.pad_token_id
        padded = TokenBatch(
            F.pad(batch.input_ids_BS, (0, missing), value=pad_id),
            F.pad(batch.input_mask_BS, (0, missing)),
            batch.target_ids_BT,
            batch.target_mask_BT,
        )
        self.work.count(padded.input_ids_BS)
        return padded


def ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Length-bucketed batches under a token budget."""
    return _our_scorer(CountingScorer, settings)


def ours_padded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same backbone and scorer, without them."""
    return _our_scorer(PaddedScorer, settings)


def _our_scorer(kind: type[CountingScorer], settings: Mapping[str, Any]) -> dict[str, Any]:
    work = _work_of(settings)
    backbone = load_backbone(BackboneConfig(path=settings["path"], sharding="replicated"))
    prompt = SoftPrompt(work.initial_prompt(backbone.d_model))
    scorer = kind(backbone, IdsAsText(work.tokenizer), settings["batch_tokens"], work)

    def predict(examples: Sequence[TokenExample], method: str) -> list[Prediction]:
        rule = AnswerRule(method, work.labels, work.max_target_tokens)  # type: ignore[arg-type]
        return scorer.predict(prompt, examples, rule)

    return _measured(work, predict)


def peft_trainer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's prompt tuning in the Trainer's `predict`, with a collator that pads to the longest."""
    from benchmarks.peft_predictor import PeftPredictor

    work = _work_of(settings)
    with tempfile.TemporaryDirectory() as name:
        return _measured(work, PeftPredictor(work, Path(name)).predict)


def _work_of(settings: Mapping[str, Any]) -> Work:
    tokenizer = load_tokenizer(Path(settings["path"]))

    def tokens(examples: Sequence[Example]) -> tuple[TokenExample, ...]:
        length = settings["fixed_length"]
        return tokenise(
            examples, tokenizer, family="seq2seq", max_input_tokens=length, append_eos=True
        ).examples

    rows = Path(settings["rows"]).read_text(encoding="utf-8").splitlines()
    examples = [Example(json.loads(row)["text"], LABELS[0]) for row in rows]
    label_ids = tuple(e.target_ids for e in tokens([Example(label, label) for label in LABELS]))
    return Work(settings, tokenizer, tokens(examples), LabelSet(LABELS, label_ids))


def _measured(work: Work, predict: Predict) -> dict[str, Any]:
    """Seconds, positions, answers and memory of each method, after a warm-up batch."""
    answer: dict[str, Any] = {
        "input_tokens": sum(len(example.input_ids) for example in work.examples)
    }
    for method in work.settings["methods"]:
        predict(work.examples[: work.settings["batch_size"]], method)
        work.positions = 0
        with PeakMemory() as peak:
            start = time.perf_counter()
            predictions = predict(work.examples, method)
            seconds = time.perf_counter() - start
        answer[method] = {
            "seconds": seconds,
            "positions": work.positions,
            "answers": [prediction.text for prediction in predictions],
            "label_scores": [prediction.label_scores for prediction in predictions],
            "peak_rss_bytes": peak.resident_bytes,
        }
    return answer
