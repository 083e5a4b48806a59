"""The models that are trained, from a batch of rows to its losses.

Axes: B rows, S encoder positions, T decoder positions, K key positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config

from softprompt_dist.backbone.t5 import T5, Encoded, aligned
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.run.loss import token_loss


class Losses(NamedTuple):
    """Sums over the tokens of a batch, as scalars."""

    total: Tensor
    """Cross-entropy with z-loss in nats, differentiable."""
    cross_entropy: Tensor
    num_tokens: Tensor


class TrainableT5(T5):
    """A T5 v1.1 with its embedding; rows may hold several examples."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)

    def checkpoint_names(self) -> dict[int, str]:
        """Id of every parameter -> its name in a Hugging Face checkpoint."""
        return {id(parameter): name for name, parameter in self.named_parameters()}

    def logits(self, batch: RowBatch) -> Tensor:
        """logits_BTV of all decoder positions."""
        assert batch.input_ids_BS is not None
        assert batch.input_segments_BS is not None
        inputs, targets = batch.input_segments_BS, batch.target_segments_BT
        encoder_bias = self.encoder.position_bias(inputs.shape[1])
        decoder_bias = self.decoder.position_bias(targets.shape[1])
        cross_mask = None
        if batch.is_packed or batch.has_padding:
            lowest = torch.finfo(encoder_bias.dtype).min
            own = _same_segment(inputs, inputs)
            encoder_bias = torch.where(own, encoder_bias, lowest)
            decoder_bias = torch.where(_same_segment(targets, targets), decoder_bias, lowest)
            # A position of padding sees everything: what sees nothing has no softmax.
            cross_mask = _same_segment(targets, inputs) | (targets == 0)[:, None, :, None]
        encoded = self.encoder(self.shared(batch.input_ids_BS), aligned(encoder_bias))
        embeds_BTD = self.shared(batch.decoder_input_ids_BT)
        return self._decoded(Encoded(encoded, cross_mask), embeds_BTD, decoder_bias)


class CausalModel(nn.Module):
    """A decoder-only model of transformers; rows are running text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def checkpoint_names(self) -> dict[int, str]:
        """Id of every parameter -> its name in a Hugging Face checkpoint."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def logits(self, batch: RowBatch) -> Tensor:
        """logits_BTV of all positions."""
        logits_BTV: Tensor = self.model(
            input_ids=batch.decoder_input_ids_BT, use_cache=False
        ).logits
        return logits_BTV


class LossModel(nn.Module):
    """What DeepSpeed trains: a language model that gives its losses."""

    def __init__(self, model: TrainableT5 | CausalModel, z_loss: float, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self._z_loss = z_loss
        self._autocast = autocast
        """Whether products are made in bf16 of weights that are kept in fp32."""
        self._training_losses: Callable[[RowBatch], Losses] = self._losses

    def compile_losses(self) -> None:
        """Let torch.compile make the training step; evaluation stays as it is."""
        self._training_losses = torch.compile(self._losses, dynamic=False)

    def forward(self, batch: RowBatch, first_only: bool = False) -> Losses | Tensor:
        """Losses of the rows; with `first_only` logits_BV of their first decoder position."""
        if first_only:
            return self._logits(batch)[:, 0].float()
        return self._training_losses(batch) if self.training else self._losses(batch)

    def _losses(self, batch: RowBatch) -> Losses:
        loss = token_loss(self._logits(batch), batch.labels_BT, z_loss=self._z_loss)
        return Losses(loss.total, loss.cross_entropy.detach(), loss.num_tokens)

    def _logits(self, batch: RowBatch) -> Tensor:
        device_type = batch.labels_BT.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self._autocast):
            return self.model.logits(batch)


def recompute_layers(model: nn.Module) -> None:
    """Keep each layer's input only; the backward pass computes the rest of it again."""
    if isinstance(model, CausalModel):
        inner = model.model
        old_name = "gradient_checkpointing_enable"  # of earlier releases of transformers 5
        enable = getattr(inner, "activation_checkpointing_enable", None) or getattr(inner, old_name)
        enable({"use_reentrant": True})
        return
    assert isinstance(model, TrainableT5)
    for block in (*model.encoder.block, *model.decoder.block):
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def compute(*inputs: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        # Re-entrant: the other kind compares shapes, which ZeRO-3 empties in between.
        return checkpoint(forward, *inputs, use_reentrant=True)

    return compute


def _same_segment(queries: Tensor, keys: Tensor) -> Tensor:
    """mask_B1QK: true where query and key belong to the same example."""
    return queries[:, None, :, None] == keys[:, None, None, :]
