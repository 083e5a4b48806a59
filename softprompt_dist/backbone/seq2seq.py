"""The shape of T5: prompt and input to an encoder, the answer to a decoder.

Axes: B batch, P prompt, S input tokens, T target tokens, L answers, N = L x T, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt_dist.backbone.base import Backbone, Reading, mask_with_prompt
from softprompt_dist.backbone.keys_values import LayerMemory
from softprompt_dist.backbone.t5 import T5
from softprompt_dist.data.batching import Family, TokenBatch
from softprompt_dist.parallel import ranks


class Seq2SeqBackbone(Backbone):
    """T5 and its like: [prompt ; input ; padding] to the encoder, target to the decoder."""

    family: Family = "seq2seq"
    model: T5

    def _logits(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        decoder_embeds_BTD = self.embedding(self._shifted(batch.target_ids_BT))
        inputs = self._inputs(prompt_BPD, batch)
        logits_BTV: Tensor = self.model(*inputs, decoder_embeds_BTD)
        return logits_BTV

    def _read(self, prompt_BPD: Tensor, batch: TokenBatch) -> Reading:
        encoded = self.model.encode(*self._inputs(prompt_BPD, batch))
        start_B = batch.input_ids_BS.new_full((len(prompt_BPD),), self._start_id)
        state = (encoded, self._new_memory())
        return self._extend(Reading(prompt_BPD.new_empty(0), state), start_B)

    def _extend(self, reading: Reading, ids_B: Tensor) -> Reading:
        encoded, memory = reading.state
        logits_B1V = self.model.extend(encoded, self.embedding(ids_B[:, None]), memory)
        return Reading(logits_B1V[:, -1], reading.state)

    def _answer_logits(
        self, prompt_BPD: Tensor, batch: TokenBatch, chunks: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        encoded = self.model.encode(*self._inputs(prompt_BPD, batch))
        memory = self._new_memory() if len(chunks) > 1 else None
        for answers_LT in chunks:
            embeds_ND = self.embedding(self._shifted(answers_LT)).flatten(0, 1)
            embeds_BND = embeds_ND.expand(len(prompt_BPD), -1, -1)
            # Keys and values of the encoder's output are kept, those of the last chunk are not.
            memory = memory and [LayerMemory(encoded=layer.encoded) for layer in memory]
            logits_BNV = self.model.decode(encoded, embeds_BND, answers_LT.shape[1], memory)
            yield logits_BNV.unflatten(1, answers_LT.shape)

    def _inputs(self, prompt_BPD: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """Prompt and input embedded, and their mask where there is padding."""
        mask_BL = mask_with_prompt(prompt_BPD, batch)
        padding = None if mask_BL.all() else ranks.sent(mask_BL, prompt_BPD.device)
        return self._embedded(prompt_BPD, batch), padding

    def _new_memory(self) -> list[LayerMemory]:
        return [LayerMemory() for _ in range(self.config.num_decoder_layers)]

    def _shifted(self, ids_BT: Tensor) -> Tensor:
        """What the decoder sees when it is to give `ids_BT`."""
        decoder_ids_BT = torch.full_like(ids_BT, self._start_id)
        decoder_ids_BT[:, 1:] = ids_BT[:, :-1]
        return decoder_ids_BT

    @property
    def _start_id(self) -> int:
        return int(self.config.decoder_start_token_id)
