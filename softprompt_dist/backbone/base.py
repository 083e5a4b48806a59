"""One interface, two shapes: a frozen model that takes a prompt before its input.

Axes: B batch, P prompt, S input tokens, T target tokens, D model width, V vocabulary.

A batch row brings its own prompt (prompt_BPD), so that nothing below assumes that one prompt
serves all rows. Call the backbone itself, never its submodules: ZeRO-3 gathers weights in hooks
that start there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.backbone.embedding import FrozenEmbedding
from softprompt_dist.backbone.flat_weights import FrozenBlock
from softprompt_dist.backbone.traffic import Traffic
from softprompt_dist.data.batching import Family, TokenBatch


@dataclass(frozen=True)
class Identity:
    """What a backbone is, however it is held."""

    path: str
    fingerprint: str
    """Of the weights; the same in every precision and under any sharding."""


class Backbone(nn.Module):
    """A frozen language model; back-propagates to the prompt and to nothing else."""

    family: Family

    def __init__(
        self, model: nn.Module, embedding: FrozenEmbedding, config: Any, identity: Identity
    ) -> None:
        super().__init__()
        self.model = model
        self.embedding = embedding
        self.config = config
        """The model's Hugging Face config."""
        self.identity = identity
        self.traffic = Traffic()
        """What this rank has received to bring sharded weights in."""
        self.engine_config: dict[str, Any] | None = None
        """What DeepSpeed is given, for a sharded backbone."""
        # In a list, so that the engine (itself a module that holds this one) is not registered as a
        # child; kept, because a collected engine removes its hooks.
        self.engines: list[Any] = []

    @property
    def fingerprint(self) -> str:
        """See `Identity`."""
        return self.identity.fingerprint

    @property
    def path(self) -> str:
        """Where the recipe says that it comes from."""
        return self.identity.path

    @property
    def d_model(self) -> int:
        """D, the width of the embeddings."""
        return int(self.embedding.table_VD.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the embedding table."""
        return int(self.embedding.table_VD.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.embedding.dtype

    @property
    def max_positions(self) -> int | None:
        """Most positions that prompt, input and target may take together; None for no limit."""
        return None

    def forward(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        """Logits of the target tokens given prompt and input.

        Returns:
            logits_BTV in the backbone's dtype; position t predicts `batch.target_ids_BT[:, t]`.
        """
        embeds_BSD = self.embedding(batch.input_ids_BS)
        return self._logits(prompt_BPD.to(embeds_BSD.dtype), embeds_BSD, batch)

    def _logits(self, prompt_BPD: Tensor, embeds_BSD: Tensor, batch: TokenBatch) -> Tensor:
        raise AssertionError("a Backbone is a Seq2SeqBackbone or a CausalBackbone")

    def install_hooks(self) -> None:
        """All ranks: have DeepSpeed bring each sharded block in and out around its use."""
        from softprompt_dist.backbone.sharding import install_hooks

        assert self.engine_config is not None, "the weights are not sharded"
        self.engines.append(install_hooks(self, self.engine_config))

    @property
    def sharded(self) -> bool:
        """Whether the weights are partitioned over the ranks."""
        return bool(self.engines)

    def blocks(self) -> Iterator[FrozenBlock]:
        """The parts that are brought in and let go as a whole."""
        return (m for m in self.model.modules() if isinstance(m, FrozenBlock))

    def held_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of all weights that this rank holds; under ZeRO-3 its parts."""
        for name, parameter in self.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter).detach()
        if self.engine_config is None:  # else it is the checkpoint's own file, mapped
            yield "embedding", self.embedding.table_VD
        yield from self.model.named_buffers()
        for name, module in self.model.named_modules():
            if isinstance(module, FrozenBlock):
                for inner, buffer in module.hidden_buffers():
                    yield f"{name}.{inner}", buffer

    def embed(self, ids_N: Tensor) -> Tensor:
        """Rows of the embedding table, [N, D] in fp32."""
        return self.embedding.rows(ids_N)

    def release(self) -> None:
        """Drop what a backward pass left gathered."""
        for engine in self.engines:
            engine.optimizer.release_backward_leftovers()


class Seq2SeqBackbone(Backbone):
    """T5 and its like: [prompt ; input ; padding] to the encoder, target to the decoder."""

    family: Family = "seq2seq"

    def _logits(self, prompt_BPD: Tensor, embeds_BSD: Tensor, batch: TokenBatch) -> Tensor:
        decoder_ids_BT = torch.full_like(batch.target_ids_BT, self.config.decoder_start_token_id)
        decoder_ids_BT[:, 1:] = batch.target_ids_BT[:, :-1]
        logits_BTV: Tensor = self.model(
            torch.cat([prompt_BPD, embeds_BSD], dim=1),
            _with_prompt(prompt_BPD, batch.input_mask_BS),
            self.embedding(decoder_ids_BT),
        )
        return logits_BTV


class CausalBackbone(Backbone):
    """Llama, GPT-NeoX, Qwen and their like: [prompt ; padding ; input ; target] in one row.

    Inputs are padded on the left, so that all targets start at the same column and the head is
    computed for them alone. Positions count real tokens only; padding changes nothing.
    """

    family: Family = "causal"

    @property
    def max_positions(self) -> int | None:
        """Most positions that prompt, input and target may take together; None for no limit."""
        names = ("max_position_embeddings", "n_positions")
        return next((int(n) for name in names if (n := getattr(self.config, name, None))), None)

    @property
    def _attention_window(self) -> float:
        return getattr(self.config, "sliding_window", None) or math.inf

    def _logits(self, prompt_BPD: Tensor, embeds_BSD: Tensor, batch: TokenBatch) -> Tensor:
        num_targets = batch.target_ids_BT.shape[1]
        start_BLD = torch.cat([prompt_BPD, embeds_BSD], dim=1)
        start_mask_BL = _with_prompt(prompt_BPD, batch.input_mask_BS)
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


def _with_prompt(prompt_BPD: Tensor, mask_BS: Tensor) -> Tensor:
    """Prompt positions are always visible (prompt-tuning `masks.py`)."""
    return torch.cat([mask_BS.new_ones(prompt_BPD.shape[:2]), mask_BS], dim=1)


def _padding_first(embeds_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Padding moved before the prompt: transformers counts it in the window of an attention."""
    order_BL = mask_BL.argsort(dim=1, stable=True)
    return embeds_BLD.take_along_dim(order_BL[:, :, None], 1), mask_BL.take_along_dim(order_BL, 1)
