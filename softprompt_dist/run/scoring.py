"""Predictions of a prompt on examples, over all ranks: none dropped, none counted twice.

Axes: B batch, T target tokens, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.data.batching import TokenBatch, TokenExample, collate
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt

Predictor = Callable[[TokenBatch], list[str]]


@dataclass(frozen=True)
class LabelSet:
    """The target strings of a task and their token ids, as `tokenise` makes them."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Scorer:
    """How predictions are made; the same under every sharding."""

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    labels: LabelSet
    method: str
    batch_size: int

    @torch.no_grad()
    def predict(self, prompt: SoftPrompt, examples: Sequence[TokenExample]) -> list[str]:
        """All ranks: one predicted string per example, in the order given, on every rank.

        Rows are sorted by length, so that a batch holds little padding, and dealt to the ranks in
        equal numbers: the last batch is filled up with rows whose predictions are thrown away,
        since every rank must reach every gather.
        """
        was_training = self.backbone.training
        self.backbone.eval()
        predict_batch = self._predictor(prompt)
        mine: list[tuple[int, str]] = []
        for indices in _rank_batches([len(e.input_ids) for e in examples], self.batch_size):
            batch = self._collate([examples[i] for i in indices])
            mine += zip(indices, predict_batch(batch), strict=True)
        self.backbone.train(was_training)
        by_index = {i: text for part in ranks.gather_objects(mine) for i, text in part}
        return [by_index[i] for i in range(len(examples))]

    def _collate(self, examples: Sequence[TokenExample]) -> TokenBatch:
        pad_id = pad_id_of(self.tokenizer)
        return collate(examples, pad_id=pad_id, family=self.backbone.family).to(ranks.device())

    def _predictor(self, prompt: SoftPrompt) -> Predictor:
        def logits_of(batch: TokenBatch) -> Tensor:
            prompt_BPD = prompt(len(batch.input_ids_BS), self.backbone.dtype)
            return self.backbone(prompt_BPD, batch).float()

        if self.method == "rank":
            return lambda batch: self._most_likely_labels(logits_of, batch)
        return lambda batch: self._generate(logits_of, batch)

    def _most_likely_labels(
        self, logits_of: Callable[[TokenBatch], Tensor], batch: TokenBatch
    ) -> list[str]:
        """The label whose tokens have the greatest total log-probability."""
        if all(len(ids) == 1 for ids in self.labels.ids):
            # One token each: a single pass holds the scores of all labels.
            logits_BV = logits_of(_with_targets(batch, self.labels.ids[0]))[:, 0]
            scores_BL = logits_BV[:, [ids[0] for ids in self.labels.ids]]
        else:
            columns = []
            for ids in self.labels.ids:
                labelled = _with_targets(batch, ids)
                logprobs_BTV = logits_of(labelled).log_softmax(dim=-1)
                chosen_BT1 = logprobs_BTV.gather(-1, labelled.target_ids_BT.unsqueeze(-1))
                columns.append(chosen_BT1.sum(dim=(1, 2)))
            scores_BL = torch.stack(columns, dim=1)
        return [self.labels.texts[i] for i in scores_BL.argmax(dim=1).tolist()]

    def _generate(self, logits_of: Callable[[TokenBatch], Tensor], batch: TokenBatch) -> list[str]:
        """Greedy decoding up to the longest label, in lockstep over the ranks."""
        eos_id = self.tokenizer.eos_token_id
        num_rows = len(batch.input_ids_BS)
        ids_BT = batch.input_ids_BS.new_empty((num_rows, 0))
        finished_B = torch.zeros(num_rows, dtype=torch.bool, device=ids_BT.device)
        for _ in range(max(len(ids) for ids in self.labels.ids)):
            # The last column is a placeholder: its logits depend on what stands before it.
            extended = torch.cat([ids_BT, ids_BT.new_zeros((num_rows, 1))], dim=1)
            logits_BV = logits_of(_with_target_rows(batch, extended))[:, -1]
            next_B = logits_BV.argmax(dim=-1).masked_fill(finished_B, eos_id)
            ids_BT = torch.cat([ids_BT, next_B.unsqueeze(1)], dim=1)
            finished_B = finished_B | (next_B == eos_id)
            unfinished = (~finished_B).any().float().reshape(1)
            if ranks.all_reduce_max(unfinished).item() == 0:
                break
        return [t.strip() for t in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, or the end-of-sequence id where a tokenizer has none (padding is masked)."""
    pad_id = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad_id is None else pad_id)


def _rank_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    stride = batch_size * ranks.world_size()
    for start in range(0, len(order), stride):
        group = order[start : start + stride]
        per_rank = -(-len(group) // ranks.world_size())
        mine = group[ranks.rank() * per_rank : (ranks.rank() + 1) * per_rank]
        yield mine + [group[-1]] * (per_rank - len(mine))


def _with_targets(batch: TokenBatch, ids: Sequence[int]) -> TokenBatch:
    row = torch.tensor(ids, dtype=torch.long, device=batch.input_ids_BS.device)
    return _with_target_rows(batch, row.expand(len(batch.input_ids_BS), -1))


def _with_target_rows(batch: TokenBatch, target_ids_BT: Tensor) -> TokenBatch:
    return TokenBatch(
        input_ids_BS=batch.input_ids_BS,
        input_mask_BS=batch.input_mask_BS,
        target_ids_BT=target_ids_BT,
        target_mask_BT=torch.ones_like(target_ids_BT, dtype=batch.input_mask_BS.dtype),
    )
