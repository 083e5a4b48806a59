"""T5 as a frozen model needs it: shared things made once, nothing kept that no gradient needs.

Axes: B batch, S source positions, T target positions, Q query and K key positions, H heads,
D model width, V vocabulary.

Modules carry the names of a Hugging Face checkpoint. The numbers are those of transformers'
T5ForConditionalGeneration; the attention bias with its mask is built once per stack instead of
once per layer (bit-identical), and activations and norms are single operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from softprompt_dist.backbone.layers import activate, activate_gated

_MASK_ALIGNMENT = 8
"""CUDA's memory-efficient attention copies a mask whose rows do not start at such a multiple."""


class Attention(nn.Module):
    """Attention without biases or scaling; T5 folds the scale into its weights."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool = False) -> None:
        super().__init__()
        width = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, width, bias=False)
        self.k = nn.Linear(config.d_model, width, bias=False)
        self.v = nn.Linear(config.d_model, width, bias=False)
        self.o = nn.Linear(width, config.d_model, bias=False)
        self.num_heads = config.num_heads
        self.dropout = config.dropout_rate
        if has_relative_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)

    def forward(self, queries_BQD: Tensor, keys_BKD: Tensor, bias_BHQK: Tensor | None) -> Tensor:
        """[B, Q, D]; `bias_BHQK` is added to the scores and masks with the lowest number."""
        attended_BHQE = F.scaled_dot_product_attention(
            self._heads(self.q(queries_BQD)),
            self._heads(self.k(keys_BKD)),
            self._heads(self.v(keys_BKD)),
            attn_mask=bias_BHQK,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        output_BQD: Tensor = self.o(attended_BHQE.transpose(1, 2).flatten(2))
        return output_BQD

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _dropout(hidden: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(hidden, rate) if training and rate else hidden


def _norm(config: T5Config) -> nn.Module:
    return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class SelfAttentionLayer(nn.Module):
    """norm, attention, residual."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, has_relative_bias=has_relative_bias)
        self.layer_norm = _norm(config)
        self.dropout = config.dropout_rate

    def forward(self, hidden_BSD: Tensor, bias_BHSS: Tensor) -> Tensor:
        """[B, S, D]."""
        normed_BSD = self.layer_norm(hidden_BSD)
        attended_BSD = self.SelfAttention(normed_BSD, normed_BSD, bias_BHSS)
        return hidden_BSD + _dropout(attended_BSD, self.dropout, self.training)


class CrossAttentionLayer(nn.Module):
    """norm, attention to the encoder's output, residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = _norm(config)
        self.dropout = config.dropout_rate

    def forward(self, hidden_BTD: Tensor, encoded_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """[B, T, D]."""
        attended_BTD = self.EncDecAttention(self.layer_norm(hidden_BTD), encoded_BSD, mask_B11S)
        return hidden_BTD + _dropout(attended_BTD, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two or (gated) three matrices."""

    wi: nn.Linear
    wi_0: nn.Linear
    wi_1: nn.Linear

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.activation = config.dense_act_fn
        self.gated = config.is_gated_act
        self.dropout = config.dropout_rate
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """[B, S, D]."""
        if self.gated:
            inner = activate_gated(self.activation, self.wi_0(hidden_BSD), self.wi_1(hidden_BSD))
        else:
            inner = activate(self.activation, self.wi(hidden_BSD))
        output_BSD: Tensor = self.wo(_dropout(inner, self.dropout, self.training))
        return output_BSD


class FeedForwardLayer(nn.Module):
    """norm, feed-forward, residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = _norm(config)
        self.dropout = config.dropout_rate

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """[B, S, D]."""
        forwarded_BSD = self.DenseReluDense(self.layer_norm(hidden_BSD))
        return hidden_BSD + _dropout(forwarded_BSD, self.dropout, self.training)


class EncoderBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        attention = SelfAttentionLayer(config, has_relative_bias=has_relative_bias)
        self.layer = nn.ModuleList([attention, FeedForwardLayer(config)])

    def forward(self, hidden_BSD: Tensor, bias_BHSS: Tensor) -> Tensor:
        """[B, S, D]."""
        attention, feed_forward = self.layer
        hidden_BSD = attention(hidden_BSD, bias_BHSS)
        output_BSD: Tensor = feed_forward(hidden_BSD)
        return output_BSD


class DecoderBlock(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        attention = SelfAttentionLayer(config, has_relative_bias=has_relative_bias)
        layers = [attention, CrossAttentionLayer(config), FeedForwardLayer(config)]
        self.layer = nn.ModuleList(layers)

    def forward(
        self, hidden_BTD: Tensor, encoded_BSD: Tensor, bias_1HTT: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """[B, T, D]."""
        attention, cross_attention, feed_forward = self.layer
        hidden_BTD = attention(hidden_BTD, bias_1HTT)
        output_BTD: Tensor = feed_forward(cross_attention(hidden_BTD, encoded_BSD, mask_B11S))
        return output_BTD


class Stack(nn.Module):
    """Encoder or decoder."""

    def __init__(self, config: T5Config, *, is_decoder: bool) -> None:
        super().__init__()
        kind = DecoderBlock if is_decoder else EncoderBlock
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        # Only the first layer holds the bias; all layers of the stack use it.
        blocks = [kind(config, has_relative_bias=index == 0) for index in range(num_layers)]
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = _norm(config)
        self.is_decoder = is_decoder
        self.dropout = config.dropout_rate
        self._max_distance = config.relative_attention_max_distance
        # In a dictionary, so that it is no second child of this name.
        bias = blocks[0].get_submodule("layer.0.SelfAttention.relative_attention_bias")
        self._shared: dict[str, Any] = {"bias": bias}

    def forward(self, hidden_BSD: Tensor, *shared: Tensor | None) -> Tensor:
        """[B, S, D]; `shared` is given to every block."""
        hidden_BSD = _dropout(hidden_BSD, self.dropout, self.training)
        for block in self.block:
            hidden_BSD = block(hidden_BSD, *shared)
        normed_BSD = self.final_layer_norm(hidden_BSD)
        return _dropout(normed_BSD, self.dropout, self.training)

    def position_bias(self, length: int) -> Tensor:
        """bias_1HSS of relative positions, for all layers; a decoder sees nothing that follows."""
        weight_NH: Tensor = self._shared["bias"].weight
        positions_S = torch.arange(length, device=weight_NH.device)
        distance_SS = positions_S[None, :] - positions_S[:, None]
        buckets_SS = T5Attention._relative_position_bucket(  # noqa: SLF001 - T5's own numbers
            distance_SS,
            bidirectional=not self.is_decoder,
            num_buckets=len(weight_NH),
            max_distance=self._max_distance,
        )
        bias_1HSS = weight_NH[buckets_SS].permute(2, 0, 1).unsqueeze(0)
        if self.is_decoder:
            bias_1HSS = bias_1HSS.masked_fill(distance_SS > 0, torch.finfo(weight_NH.dtype).min)
        return bias_1HSS


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

    def forward(self, embeds_BSD: Tensor, mask_BS: Tensor, decoder_embeds_BTD: Tensor) -> Tensor:
        """logits_BTV given embedded input, its mask (1 at tokens) and embedded decoder input."""
        padded = not bool(mask_BS.all())
        bias_BHSS = self.encoder.position_bias(embeds_BSD.shape[1])
        mask_B11S = mask_BS[:, None, None, :].bool() if padded else None
        if mask_B11S is not None:
            lowest = torch.finfo(bias_BHSS.dtype).min
            bias_BHSS = torch.where(mask_B11S, bias_BHSS, lowest)
        encoded_BSD = self.encoder(embeds_BSD, _aligned(bias_BHSS))
        bias_1HTT = self.decoder.position_bias(decoder_embeds_BTD.shape[1])
        decoded_BTD = self.decoder(decoder_embeds_BTD, encoded_BSD, _aligned(bias_1HTT), mask_B11S)
        if self.scales_output:
            decoded_BTD = decoded_BTD * self.config.d_model**-0.5
        logits_BTV: Tensor = self.lm_head(decoded_BTD)
        return logits_BTV


def _aligned(bias_BHQK: Tensor) -> Tensor:
    """The same numbers, in rows that start at aligned addresses."""
    num_keys = bias_BHQK.shape[-1]
    padding = -num_keys % _MASK_ALIGNMENT
    return F.pad(bias_BHQK, (0, padding))[..., :num_keys] if padding else bias_BHQK.contiguous()
