"""The shape of decoder-only models: prompt, input and answer in one row.

Axes: B batch, P prompt, S input tokens, L = P + S or all tokens of a row, T target tokens,
A answers, N = B x A, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt_dist.backbone.base import Backbone, PositionLimit, Reading, mask_with_prompt
from softprompt_dist.data.batching import Family, TokenBatch
from softprompt_dist.parallel import ranks


class CausalBackbone(Backbone):
    """Llama, GPT-NeoX, Qwen and their like: [padding ; prompt ; input ; target] in one row.

    All targets start at the same column, so that the head is computed for them alone. Positions
    count real tokens only, and nothing lies between two tokens of a row: the attention windows and
    chunks of some models count columns. So padding changes nothing.
    """

    family: Family = "causal"
    model: Any

    @property
    def position_limit(self) -> PositionLimit | None:
        """How long a row may be; None for no limit."""
        names = ("max_position_embeddings", "n_positions")
        has = (int(n) for name in names if (n := getattr(self.config, name, None)))
        limits = [PositionLimit(n, f"the backbone has {n}") for n in has]
        return min([*limits, *self._rope_limits()], key=lambda x: x.positions, default=None)

    def _rope_limits(self) -> Iterator[PositionLimit]:
        rope = getattr(self.config, "rope_parameters", None) or {}
        of_layer_types = (value for value in rope.values() if isinstance(value, dict))
        for parameters in (rope, *of_layer_types):
            if parameters.get("rope_type") == "longrope":
                n = int(parameters["original_max_position_embeddings"])
                reason = (
                    f"the backbone answers up to {n} here: beyond them its rotary frequencies "
                    "(longrope) are chosen for all rows of a batch by the longest"
                )
                yield PositionLimit(n, reason)

    def _logits(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        num_targets = batch.target_ids_BT.shape[1]
        start_BLD, start_mask_BL = self._start(prompt_BPD, batch)
        mask_BL = torch.cat([start_mask_BL, batch.target_mask_BT.to(start_mask_BL)], dim=1)
        logits: Tensor = self.model(
            inputs_embeds=torch.cat([start_BLD, self.embedding(batch.target_ids_BT)], dim=1),
            **_padding(mask_BL, mask_BL.shape[1], start_BLD.device),
            use_cache=False,
            logits_to_keep=num_targets + 1,
        ).logits
        return logits[:, -num_targets - 1 : -1]

    def _start(self, prompt_BPD: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """[padding ; prompt ; input] embedded, [B, L, D], and the mask of its tokens."""
        embeds_BLD = self._embedded(prompt_BPD, batch)
        mask_BL = mask_with_prompt(prompt_BPD, batch).long()
        if mask_BL.all():
            return embeds_BLD, mask_BL
        # The input's padding lies behind the prompt, where they were put side by side.
        order_BL = mask_BL.argsort(dim=1, stable=True)
        # By whole rows: an index for every number would be kept for the backward pass.
        rows_BL = order_BL + torch.arange(len(order_BL))[:, None] * order_BL.shape[1]
        rows_N = ranks.sent(rows_BL.flatten(), embeds_BLD.device)
        embeds_BLD = embeds_BLD.flatten(0, 1).index_select(0, rows_N).view_as(embeds_BLD)
        return embeds_BLD, mask_BL.take_along_dim(order_BL, 1)

    def _read(self, prompt_BPD: Tensor, batch: TokenBatch) -> Reading:
        embeds_BLD, mask_BL = self._start(prompt_BPD, batch)
        logits_B1V, state = self._continue(embeds_BLD, mask_BL, DynamicCache())
        return Reading(logits_B1V[:, -1], state)

    def _extend(self, reading: Reading, ids_B: Tensor) -> Reading:
        mask_BL, cache = reading.state
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], dim=1)
        logits_B1V, state = self._continue(self.embedding(ids_B[:, None]), mask_BL, cache)
        return Reading(logits_B1V[:, -1], state)

    def _answer_logits(
        self, prompt_BPD: Tensor, batch: TokenBatch, chunks: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        reading = self._read(prompt_BPD, batch)
        mask_BL, cache = reading.state
        for answers_AT in chunks:
            num_answers, length = answers_AT.shape
            first_BA1V = reading.logits_BV[:, None, None].expand(-1, num_answers, -1, -1)
            if length == 1:
                yield first_BA1V
                continue
            copies = copy.deepcopy(cache)
            copies.batch_repeat_interleave(num_answers)
            mask_NL = mask_BL.repeat_interleave(num_answers, dim=0)
            given_NT = answers_AT[:, :-1].repeat(len(prompt_BPD), 1)
            mask_NL = torch.cat([mask_NL, torch.ones_like(given_NT)], dim=1)
            logits_NTV, _ = self._continue(self.embedding(given_NT), mask_NL, copies)
            others_BATV = logits_NTV.unflatten(0, (len(prompt_BPD), num_answers))
            yield torch.cat([first_BA1V, others_BATV], dim=2)

    def _continue(
        self, embeds_BTD: Tensor, mask_BL: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, tuple[Tensor, DynamicCache]]:
        """Logits behind new tokens, of which the input's is the last one's only; what is held then.

        `mask_BL`, on the host, is of all tokens, those that `cache` holds and the new ones.
        """
        num_new = embeds_BTD.shape[1]
        reads_input = cache.get_seq_length() == 0
        logits: Tensor = self.model(
            inputs_embeds=embeds_BTD,
            **_padding(mask_BL, num_new, embeds_BTD.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if reads_input else num_new,
        ).logits
        return logits, (mask_BL, cache)


def _padding(mask_BL: Tensor, num_new: int, device: torch.device) -> dict[str, Tensor]:
    """What transformers is told of padding, given the host's mask of all tokens.

    Nothing where there is none, so that it need not look at a mask on the device to find out.
    """
    if mask_BL.all():
        return {}
    positions_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    return {
        "attention_mask": ranks.sent(mask_BL, device),
        "position_ids": ranks.sent(positions_BL[:, -num_new:], device),
    }
