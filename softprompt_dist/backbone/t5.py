"""T5 as a frozen model needs it: shared things made once, nothing kept that no gradient needs.

Axes: B batch, S source positions, T target positions, Q query and K key positions, H heads,
D model width, V vocabulary.

Modules carry the names of a Hugging Face checkpoint. The numbers are those of transformers'
T5ForConditionalGeneration; the attention bias with its mask is built once per stack instead of
once per layer (bit-identical), and activations and norms are single operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from softprompt_dist.backbone.keys_values import LayerMemory
from softprompt_dist.backbone.t5_layers import DecoderBlock, EncoderBlock, dropout, norm

_MASK_ALIGNMENT = 8
"""CUDA's memory-efficient attention copies a mask whose rows do not start at such a multiple."""


class Stack(nn.Module):
    """Encoder or decoder."""

    def __init__(self, config: T5Config, *, is_decoder: bool) -> None:
        super().__init__()
        kind = DecoderBlock if is_decoder else EncoderBlock
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        # Only the first layer holds the bias; all layers of the stack use it.
        blocks = [kind(config, has_relative_bias=index == 0) for index in range(num_layers)]
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = norm(config)
        self.is_decoder = is_decoder
        self.dropout = config.dropout_rate
        self._num_buckets = config.relative_attention_num_buckets
        self._max_distance = config.relative_attention_max_distance
        # In a dictionary, so that it is no second child of this name.
        bias = blocks[0].get_submodule("layer.0.SelfAttention.relative_attention_bias")
        self._shared: dict[str, Any] = {"bias": bias}

    def forward(
        self,
        hidden_BSD: Tensor,
        *shared: Tensor | None,
        memory: Sequence[LayerMemory] | None = None,
    ) -> Tensor:
        """[B, S, D]; `shared` is given to every block, and of `memory` its own part."""
        hidden_BSD = dropout(hidden_BSD, self.dropout, self.training)
        for index, block in enumerate(self.block):
            own = {} if memory is None else {"memory": memory[index]}
            hidden_BSD = block(hidden_BSD, *shared, **own)
        normed_BSD = self.final_layer_norm(hidden_BSD)
        return dropout(normed_BSD, self.dropout, self.training)

    def position_bias(self, length: int) -> Tensor:
        """bias_1HSS of relative positions, for all layers; a decoder sees nothing that follows."""
        bias = self._shared["bias"]
        # Of each distance from key to query once, not of each pair: one more than there are.
        distances_R = torch.arange(1 - length, length + 1, device=bias.weight.device)
        buckets_R = T5Attention._relative_position_bucket(  # noqa: SLF001 - T5's own numbers
            distances_R,
            bidirectional=not self.is_decoder,
            num_buckets=self._num_buckets,
            max_distance=self._max_distance,
        )
        # By a call, which brings the weight in where it is sharded.
        bias_1HSS = _by_pairs(bias(buckets_R).T, length).unsqueeze(0)
        if self.is_decoder:
            follows_SS = torch.ones_like(bias_1HSS[0, 0], dtype=torch.bool).triu(1)
            bias_1HSS = bias_1HSS.masked_fill(follows_SS, torch.finfo(bias_1HSS.dtype).min)
        return bias_1HSS


def _by_pairs(bias_HR: Tensor, length: int) -> Tensor:
    """bias_HSS[:, i, j] of distances j - i, given bias_HR of distances 1 - S to S.

    Copies of its R = 2 S numbers behind one another, read R - 1 at a time: every row begins one
    distance earlier.
    """
    repeated = bias_HR[:, None].expand(-1, length, -1).flatten(1)
    rows_HSR = repeated[:, : length * (2 * length - 1)].view(-1, length, 2 * length - 1)
    return rows_HSR[..., length - 1 :]


@dataclass(frozen=True)
class Encoded:
    """The encoder's output, and the mask of its padding where there is any (true at tokens)."""

    states_BSD: Tensor
    mask_B11S: Tensor | None


class T5(nn.Module):
    """T5 v1.0 and v1.1, from embeddings to logits."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.scales_output = bool(getattr(config, "scale_decoder_outputs", False))
        """Of v1.0, whose head is the embedding table; an mT5's config does not speak of it."""
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self, embeds_BSD: Tensor, mask_BS: Tensor | None, decoder_embeds_BTD: Tensor
    ) -> Tensor:
        """logits_BTV given embedded input, its mask (see `encode`) and embedded decoder input."""
        encoded = self.encode(embeds_BSD, mask_BS)
        return self.decode(encoded, decoder_embeds_BTD, decoder_embeds_BTD.shape[1])

    def encode(self, embeds_BSD: Tensor, mask_BS: Tensor | None) -> Encoded:
        """What the decoder looks at, given embedded input.

        Its mask is 1 at tokens, or None where there is no padding.
        """
        bias_BHSS = self.encoder.position_bias(embeds_BSD.shape[1])
        mask_B11S = None if mask_BS is None else mask_BS[:, None, None, :].bool()
        if mask_B11S is not None:
            lowest = torch.finfo(bias_BHSS.dtype).min
            bias_BHSS = torch.where(mask_B11S, bias_BHSS, lowest)
        return Encoded(self.encoder(embeds_BSD, aligned(bias_BHSS)), mask_B11S)

    def decode(
        self,
        encoded: Encoded,
        decoder_embeds_BND: Tensor,
        length: int,
        memory: Sequence[LayerMemory] | None = None,
    ) -> Tensor:
        """logits_BNV of embedded decoder input: answers of `length` tokens behind one another.

        Answers do not see each other; they share the encoder's keys and values, which `memory`
        keeps.
        """
        bias_1HTT = self.decoder.position_bias(length)
        return self._decoded(encoded, decoder_embeds_BND, bias_1HTT, memory)

    def extend(
        self, encoded: Encoded, decoder_embeds_B1D: Tensor, memory: Sequence[LayerMemory]
    ) -> Tensor:
        """logits_B1V of the next decoder position; `memory` holds those before, and grows."""
        held = memory[0].attended.held
        position = 0 if held is None else held[0].shape[2]
        bias_1H1T = self.decoder.position_bias(position + 1)[:, :, -1:]
        return self._decoded(encoded, decoder_embeds_B1D, bias_1H1T, memory)

    def _decoded(
        self,
        encoded: Encoded,
        embeds_BTD: Tensor,
        bias_1HTK: Tensor,
        memory: Sequence[LayerMemory] | None = None,
    ) -> Tensor:
        shared = (encoded.states_BSD, aligned(bias_1HTK), encoded.mask_B11S)
        decoded_BTD = self.decoder(embeds_BTD, *shared, memory=memory)
        if self.scales_output:
            decoded_BTD = decoded_BTD * self.config.d_model**-0.5
        logits_BTV: Tensor = self.lm_head(decoded_BTD)
        return logits_BTV


def aligned(bias_BHQK: Tensor) -> Tensor:
    """The same numbers, in rows that start at aligned addresses."""
    num_keys = bias_BHQK.shape[-1]
    padding = -num_keys % _MASK_ALIGNMENT
    return F.pad(bias_BHQK, (0, padding))[..., :num_keys] if padding else bias_BHQK.contiguous()
