"""The layers of a lean T5; see `t5.py`.

Axes: B batch, S source positions, T target positions, N those of all answers to a row, M answers to
all rows, Q query and K key positions, H heads, E width of a head, D model width.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from transformers import T5Config

from softprompt_dist.backbone.keys_values import Heads, KeysValues, LayerMemory
from softprompt_dist.backbone.layers import activate, activate_gated


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

    def forward(
        self,
        queries_BQD: Tensor,
        keys_BKD: Tensor,
        bias_BHQK: Tensor | None,
        memory: KeysValues | None = None,
    ) -> Tensor:
        """[B, Q, D]; `bias_BHQK` is added to the scores and masks with the lowest number."""

        def compute() -> Heads:
            return self._heads(self.k(keys_BKD)), self._heads(self.v(keys_BKD))

        keys_BHKE, values_BHKE = compute() if memory is None else memory.updated(compute)
        attended_BHQE = F.scaled_dot_product_attention(
            self._heads(self.q(queries_BQD)),
            keys_BHKE,
            values_BHKE,
            attn_mask=bias_BHQK,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        output_BQD: Tensor = self.o(attended_BHQE.transpose(1, 2).flatten(2))
        return output_BQD

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def dropout(hidden: Tensor, rate: float, training: bool) -> Tensor:
    """Of activations, where there is any."""
    return F.dropout(hidden, rate) if training and rate else hidden


def norm(config: T5Config) -> nn.Module:
    """T5's, which does not centre."""
    return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class SelfAttentionLayer(nn.Module):
    """norm, attention, residual."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, has_relative_bias=has_relative_bias)
        self.layer_norm = norm(config)
        self.dropout = config.dropout_rate

    def forward(
        self, hidden_BSD: Tensor, bias_BHSS: Tensor, memory: KeysValues | None = None
    ) -> Tensor:
        """[B, S, D]."""
        normed_BSD = self.layer_norm(hidden_BSD)
        attended_BSD = self.SelfAttention(normed_BSD, normed_BSD, bias_BHSS, memory)
        return hidden_BSD + dropout(attended_BSD, self.dropout, self.training)


class CrossAttentionLayer(nn.Module):
    """norm, attention to the encoder's output, residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = norm(config)
        self.dropout = config.dropout_rate

    def forward(
        self,
        hidden_BTD: Tensor,
        encoded_BSD: Tensor,
        mask_B11S: Tensor | None,
        memory: KeysValues | None = None,
    ) -> Tensor:
        """[B, T, D]."""
        normed_BTD = self.layer_norm(hidden_BTD)
        attended_BTD = self.EncDecAttention(normed_BTD, encoded_BSD, mask_B11S, memory)
        return hidden_BTD + dropout(attended_BTD, self.dropout, self.training)


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
        output_BSD: Tensor = self.wo(dropout(inner, self.dropout, self.training))
        return output_BSD


class FeedForwardLayer(nn.Module):
    """norm, feed-forward, residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = norm(config)
        self.dropout = config.dropout_rate

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """[B, S, D]."""
        forwarded_BSD = self.DenseReluDense(self.layer_norm(hidden_BSD))
        return hidden_BSD + dropout(forwarded_BSD, self.dropout, self.training)


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
        self,
        hidden_BND: Tensor,
        encoded_BSD: Tensor,
        bias_1HTT: Tensor,
        mask_B11S: Tensor | None,
        memory: LayerMemory | None = None,
    ) -> Tensor:
        """[B, N, D] of N / T answers behind one another, which do not see each other."""
        attention, cross_attention, feed_forward = self.layer
        # A view, so that its gradients are added up within a block before they meet the other
        # blocks', as they are where DeepSpeed watches a block's inputs: sums then round alike.
        encoded_BSD = encoded_BSD.view_as(encoded_BSD)
        attended, encoded = (memory.attended, memory.encoded) if memory else (None, None)
        answers_MTD = hidden_BND.reshape(-1, bias_1HTT.shape[2], hidden_BND.shape[2])
        hidden_BND = attention(answers_MTD, bias_1HTT, attended).view(hidden_BND.shape)
        hidden_BND = cross_attention(hidden_BND, encoded_BSD, mask_B11S, encoded)
        output_BND: Tensor = feed_forward(hidden_BND)
        return output_BND
