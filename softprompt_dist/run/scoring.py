"""Predictions of a prompt on examples, over all ranks: none dropped, none counted twice.

Axes: B batch, A answers (the label set), T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.data.batching import TokenBatch, TokenExample, collate
from softprompt_dist.data.bucketing import batches_by_length
from softprompt_dist.data.detokenise import detokenise
from softprompt_dist.lifecycle.watchdog import settle, tick
from softprompt_dist.metrics.answer_text import remove_first_sentinel
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.progress import Phase, phase
from softprompt_dist.prompt.module import SoftPrompt


@dataclass(frozen=True)
class LabelSet:
    """The target strings of a task and their token ids, as `tokenise` makes them.

    A task's `target_prefix` is among the ids and not in the texts.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AnswerRule:
    """How an answer is found."""

    method: Literal["rank", "greedy"]
    labels: LabelSet
    """Empty for free text, which only `greedy` can give."""
    max_target_tokens: int
    """greedy: answers end here, the prefix included."""
    length_normalisation: Literal["none", "tokens", "characters"] = "none"
    target_prefix: str | None = None
    """The piece that answers begin with, which is no part of what they say."""

    @property
    def name(self) -> str:
        """As reports call it."""
        if self.method == "greedy" or self.length_normalisation == "none":
            return self.method
        return f"{self.method} (log-probability per {self.length_normalisation[:-1]})"

    @property
    def prefix_tokens(self) -> int:
        """How many ids of a label, and of what is generated, are the prefix's."""
        return 0 if self.target_prefix is None else 1

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer that may be found."""
        if self.method == "greedy":
            return self.max_target_tokens
        return max(map(len, self.labels.ids))

    @property
    def positions(self) -> int:
        """Target positions that a row takes."""
        side_by_side = 1 if self.method == "greedy" else len(self.labels.ids)
        return side_by_side * self.answer_tokens


@dataclass(frozen=True)
class Prediction:
    """An answer and, where it was chosen among labels, the score of each in their order."""

    text: str
    label_scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Turn:
    """What a rank scores in a round."""

    indices: list[int]
    """Which inputs."""
    counts: bool
    """Whether what is found is an answer, or only keeps the others company."""
    labels_at_a_time: int
    fewest_at_a_time: int
    """Of any rank in this round; those with more pass through the model as often all the same."""


@dataclass(frozen=True)
class Scorer:
    """Makes predictions; the same ones under every sharding and on any number of ranks."""

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    batch_tokens: int
    """Positions that a rank scores at a time."""

    def predict(
        self,
        prompt: SoftPrompt,
        examples: Sequence[TokenExample],
        rule: AnswerRule,
        what: str = "scoring",
    ) -> list[Prediction]:
        """All ranks: a prediction for each example, in the order given, on every rank.

        Equal inputs are read once. Batches depend on the inputs alone, not on the ranks, so that
        any number of them computes the same sums in the same order. `what` is what people are told.
        """
        return self.predict_blocks(prompt, [examples], rule, what)

    @torch.no_grad()
    def predict_blocks(
        self,
        prompt: SoftPrompt,
        blocks: Sequence[Sequence[TokenExample]],
        rule: AnswerRule,
        what: str = "scoring",
    ) -> list[Prediction]:
        """All ranks: as `predict`, of the examples of all blocks; no batch has those of two.

        So a block's predictions are the same to the bit whichever blocks are asked for with it.
        """
        was_training = self.backbone.training
        self.backbone.eval()
        inputs: list[tuple[int, ...]] = []
        of_example: list[int] = []
        batches: list[list[int]] = []
        for block in blocks:
            places: dict[tuple[int, ...], int] = {}
            start = len(inputs)
            of_example += [start + places.setdefault(e.input_ids, len(places)) for e in block]
            inputs += places
            batches += [[start + i for i in batch] for batch in self._batches(prompt, places, rule)]
        lengths = [[len(inputs[i]) for i in batch] for batch in batches]
        sizes = [self._labels_at_a_time(prompt, batch, rule) for batch in lengths]
        mine: list[tuple[int, Prediction]] = []
        with phase(what, len(inputs), "rows") as told:
            for turn in self._rounds(batches, sizes, told):
                batch = self._collate([inputs[i] for i in turn.indices])
                predictions = self._predict_batch(prompt, batch, rule, turn)
                if turn.counts:
                    mine += zip(turn.indices, predictions, strict=True)
        self.backbone.train(was_training)
        by_place = {i: found for part in ranks.gather_objects(mine) for i, found in part}
        return [by_place[place] for place in of_example]

    def _batches(
        self, prompt: SoftPrompt, inputs: Collection[tuple[int, ...]], rule: AnswerRule
    ) -> list[list[int]]:
        """Which inputs are read together, by their place."""
        copies = len(rule.labels.ids) if self._repeats_inputs(rule) else 1
        return batches_by_length(
            [len(ids) for ids in inputs],
            prompt_length=prompt.weight.shape[0],
            budget=max(1, self.batch_tokens // copies),
            extra=rule.positions // copies,
        )

    def _labels_at_a_time(self, prompt: SoftPrompt, lengths: list[int], rule: AnswerRule) -> int:
        """How many labels of a batch's rows are scored together: all, if it has several rows."""
        if rule.method == "greedy":
            return 1
        width, read = max(map(len, rule.labels.ids)), prompt.weight.shape[0] + max(lengths)
        of_row = self.batch_tokens // len(lengths)
        repeats = self._repeats_inputs(rule)
        fitting = of_row // (read + width) if repeats else (of_row - read) // width
        return min(max(1, fitting), len(rule.labels.ids))

    def _rounds(
        self, batches: Sequence[list[int]], sizes: Sequence[int], told: Phase
    ) -> Iterator[_Turn]:
        """This rank's batches; all ranks, in as many rounds.

        A round is where a run that is asked to stop can end: nothing is half done.

        Under ZeRO-3 all ranks must reach every gather: one that has no batch left takes a single
        row along, whose prediction is thrown away, and all take as many passes as the slowest.
        """
        for start in range(0, len(batches), ranks.world_size()):
            if start:
                settle()
            stop.end_here_if_asked("scoring")
            own = start + ranks.rank()
            smallest = min(sizes[start : start + ranks.world_size()])
            if own < len(batches):
                most = smallest if self.backbone.sharded else sizes[own]
                yield _Turn(batches[own], True, sizes[own], most)
            elif self.backbone.sharded:
                yield _Turn(batches[-1][-1:], False, sizes[-1], smallest)
            told.advance(sum(map(len, batches[start : start + ranks.world_size()])))

    def _repeats_inputs(self, rule: AnswerRule) -> bool:
        """Whether what is held of an input is needed once for each label."""
        if rule.method == "greedy" or self.backbone.family == "seq2seq":
            return False
        return max(map(len, rule.labels.ids)) > 1

    def _collate(self, inputs: Sequence[tuple[int, ...]]) -> TokenBatch:
        pad_id = pad_id_of(self.tokenizer)
        examples = [TokenExample(ids, (pad_id,)) for ids in inputs]
        return collate(examples, pad_id=pad_id, family=self.backbone.family)

    def _predict_batch(
        self, prompt: SoftPrompt, batch: TokenBatch, rule: AnswerRule, turn: _Turn
    ) -> list[Prediction]:
        prompt_BPD = prompt(len(batch.input_ids_BS), self.backbone.dtype)
        if rule.method == "greedy":
            return self._generated(prompt_BPD, batch, rule)
        scores_BA = self._label_scores(prompt_BPD, batch, rule, turn)
        return [
            Prediction(rule.labels.texts[best], tuple(scores))
            for best, scores in zip(
                scores_BA.argmax(dim=1).tolist(), scores_BA.tolist(), strict=True
            )
        ]

    def _label_scores(
        self, prompt_BPD: Tensor, batch: TokenBatch, rule: AnswerRule, turn: _Turn
    ) -> Tensor:
        """scores_BA: each label's total log-probability, divided as the rule says.

        It is that of the label after the prefix, whose own is the same for all.
        """
        labels = rule.labels
        width = max(map(len, labels.ids))
        answers_AT = torch.zeros(len(labels.ids), width, dtype=torch.long)
        mask_AT = torch.zeros(answers_AT.shape)
        for row, ids in enumerate(labels.ids):
            answers_AT[row, : len(ids)] = torch.tensor(ids)
            mask_AT[row, rule.prefix_tokens : len(ids)] = 1
        chunks = answers_AT.split(turn.labels_at_a_time)
        silent = -(-len(labels.ids) // turn.fewest_at_a_time) - len(chunks)
        found = self.backbone.score_answers(
            prompt_BPD, batch, [*chunks, *silent * chunks[-1:]], _log_probabilities
        )
        log_probabilities_BAT = torch.cat(found[: len(chunks)], dim=1)
        device = log_probabilities_BAT.device
        scores_BA = (log_probabilities_BAT * ranks.sent(mask_AT, device)).sum(dim=-1)
        return scores_BA / ranks.sent(_divisors(rule), device)

    def _generated(
        self, prompt_BPD: Tensor, batch: TokenBatch, rule: AnswerRule
    ) -> list[Prediction]:
        """Greedy decoding; under ZeRO-3 the ranks go on until the last of them is done."""
        eos_id = self.tokenizer.eos_token_id
        reading = self.backbone.read(prompt_BPD, batch)
        finished_B = torch.zeros(len(prompt_BPD), dtype=torch.bool)
        columns: list[Tensor] = []
        while True:
            tick()
            # All that is asked of the device: ends are seen, and ids looked up, on the host.
            next_B = reading.logits_BV.argmax(dim=-1).cpu().masked_fill(finished_B, eos_id)
            columns.append(next_B)
            finished_B = finished_B | (next_B == eos_id)
            if len(columns) == rule.max_target_tokens or self._all_finished(finished_B):
                break
            reading = self.backbone.extend(reading, next_B)
        ids_BT = torch.stack(columns, dim=1).tolist()
        texts = detokenise(ids_BT, self.tokenizer)
        if rule.target_prefix is not None:
            texts = [remove_first_sentinel(text, rule.target_prefix) for text in texts]
        return [Prediction(text.strip()) for text in texts]

    def _all_finished(self, finished_B: Tensor) -> bool:
        unfinished = (~finished_B).any().float().reshape(1)
        if self.backbone.sharded:
            ranks.all_reduce_max(unfinished := unfinished.to(ranks.device()))
        return unfinished.item() == 0


def _log_probabilities(logits_BATV: Tensor, answers_AT: Tensor) -> Tensor:
    """Of each token of the answers to each row, [B, A, T] in fp32."""
    targets_BAT = ranks.sent(answers_AT, logits_BATV.device).expand(len(logits_BATV), -1, -1)
    logits_NV = logits_BATV.flatten(0, 2).float()
    return -F.cross_entropy(logits_NV, targets_BAT.flatten(), reduction="none").view_as(targets_BAT)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; where a tokenizer has none, any other (padding is masked)."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in known if i is not None), 0)


def _divisors(rule: AnswerRule) -> Tensor:
    """What each label's log-probability is divided by, [A]."""
    if rule.length_normalisation == "none":
        return torch.ones(len(rule.labels.ids))
    if rule.length_normalisation == "tokens":
        return torch.tensor([float(len(ids) - rule.prefix_tokens) for ids in rule.labels.ids])
    return torch.tensor([float(len(text)) for text in rule.labels.texts])
