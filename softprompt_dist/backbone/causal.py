"""The shape of decoder-only models: prompt, input and answer in one row.

Axes: B batch, P prompt, S input tokens, L = P + S or all tokens of a row, T target tokens,
A answers, N = B x A, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt_dist.backbone.base import Backbone, Reading
from softprompt_dist.data.batching import Family, TokenBatch


class CausalBackbone(Backbone):
    """Llama, GPT-NeoX, Qwen and their like: [prompt ; padding ; input ; target] in one row.

    Inputs are padded on the left, so that all targets start at the same column and the head is
    computed for them alone. Positions count real tokens only; padding changes nothing.
    """

    family: Family = "causal"
    model: Any

    @property
    def max_positions(self) -> int | None:
        """Most positions that prompt, input and target may take together; None for no limit."""
        names = ("max_position_embeddings", "n_positions")
        return next((int(n) for name in names if (n := getattr(self.config, name, None))), None)

    def _logits(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        num_targets = batch.target_ids_BT.shape[1]
        start_BLD, start_mask_BL = self._embedded(prompt_BPD, batch)
        if start_BLD.shape[1] + num_targets > self._attention_window:
            start_BLD, start_mask_BL = _padding_first(start_BLD, start_mask_BL)
        mask = torch.cat([start_mask_BL, batch.target_mask_BT], dim=1).long()
        logits: Tensor = self.model(
            inputs_embeds=torch.cat([start_BLD, self.embedding(batch.target_ids_BT)], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=num_targets + 1,
        ).logits
        return logits[:, -num_targets - 1 : -1]

    def _read(self, prompt_BPD: Tensor, batch: TokenBatch) -> Reading:
        embeds_BLD, mask_BL = self._embedded(prompt_BPD, batch)
        if self._attention_window < math.inf:
            embeds_BLD, mask_BL = _padding_first(embeds_BLD, mask_BL)
        logits_B1V, state = self._continue(embeds_BLD, mask_BL, DynamicCache(config=self.config))
        return Reading(logits_B1V[:, -1], state)

    def _extend(self, reading: Reading, ids_B: Tensor) -> Reading:
        mask_BL, cache = reading.state
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], dim=1)
        logits_B1V, state = self._continue(self.embedding(ids_B[:, None]), mask_BL, cache)
        return Reading(logits_B1V[:, -1], state)

    def _answer_logits(self, prompt_BPD: Tensor, batch: TokenBatch, answers_AT: Tensor) -> Tensor:
        reading = self._read(prompt_BPD, batch)
        num_answers, length = answers_AT.shape
        first_BA1V = reading.logits_BV[:, None, None].expand(-1, num_answers, -1, -1)
        if length == 1:
            return first_BA1V
        mask_BL, cache = reading.state
        cache.batch_repeat_interleave(num_answers)
        mask_NL = mask_BL.repeat_interleave(num_answers, dim=0)
        given_NT = answers_AT[:, :-1].repeat(len(prompt_BPD), 1)
        mask_NL = torch.cat([mask_NL, torch.ones_like(given_NT, dtype=mask_NL.dtype)], dim=1)
        logits_NTV, _ = self._continue(self.embedding(given_NT), mask_NL, cache)
        others_BATV = logits_NTV.unflatten(0, (len(prompt_BPD), num_answers))
        return torch.cat([first_BA1V, others_BATV], dim=2)

    def _continue(
        self, embeds_BTD: Tensor, mask_BL: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, tuple[Tensor, DynamicCache]]:
        """Logits behind new tokens, of which the input's is the last one's only; what is held then.

        `mask_BL` is of all tokens, those that `cache` holds and the new ones.
        """
        num_new = embeds_BTD.shape[1]
        positions_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        reads_input = cache.get_seq_length() == 0
        logits: Tensor = self.model(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BL.long(),
            position_ids=positions_BL[:, -num_new:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if reads_input else num_new,
        ).logits
        return logits, (mask_BL, cache)

    @property
    def _attention_window(self) -> float:
        return getattr(self.config, "sliding_window", None) or math.inf


def _padding_first(embeds_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Padding moved before the prompt: transformers counts it in the window of an attention."""
    order_BL = mask_BL.argsort(dim=1, stable=True)
    return embeds_BLD.take_along_dim(order_BL[:, :, None], 1), mask_BL.take_along_dim(order_BL, 1)
