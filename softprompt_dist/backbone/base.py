"""One interface, two shapes: a frozen model that takes a prompt before its input.

Axes: B batch, P prompt, S input tokens, T target tokens, D model width, V vocabulary.

A batch row brings its own prompt (prompt_BPD), so that nothing below assumes that one prompt
serves all rows. Call the backbone itself, never its submodules: ZeRO-3 gathers weights in hooks
that start there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.data.batching import Family, TokenBatch


class Backbone(nn.Module):
    """A frozen language model; back-propagates to the prompt and to nothing else."""

    family: Family

    def __init__(self, model: nn.Module, *, fingerprint: str = "", path: str = "") -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.fingerprint = fingerprint
        """Identity of the weights, the same in fp32 and bf16 and under any sharding."""
        self.path = path
        # In a list, so that the engine (itself a module that holds this one) is not registered as a
        # child; kept, because a collected engine removes its hooks.
        self._engines: list[Any] = []

    @property
    def config(self) -> Any:
        """The model's Hugging Face config."""
        return self.model.config

    @property
    def d_model(self) -> int:
        """D, the width of the embeddings."""
        return int(getattr(self.config, "d_model", None) or self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the activations."""
        return next(self.model.parameters()).dtype

    @property
    def max_positions(self) -> int | None:
        """Most positions that prompt, input and target may take together; None for no limit."""
        return None

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the embedding table."""
        table = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return int(getattr(table, "ds_shape", table.shape)[0])

    def forward(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        """Logits of the target tokens given prompt and input.

        Returns:
            logits_BTV in the backbone's dtype; position t predicts `batch.target_ids_BT[:, t]`.
        """
        embeds_BSD = self.model.get_input_embeddings()(batch.input_ids_BS)  # type: ignore[operator]
        return self._logits(prompt_BPD.to(embeds_BSD.dtype), embeds_BSD, batch)

    def _logits(self, prompt_BPD: Tensor, embeds_BSD: Tensor, batch: TokenBatch) -> Tensor:
        raise AssertionError("a Backbone is a Seq2SeqBackbone or a CausalBackbone")

    def shard(self, engine_config: dict[str, Any]) -> None:
        """All ranks: partition the weights with DeepSpeed ZeRO-3, each rank keeping its part.

        No optimizer is handed over: DeepSpeed then installs the gather hooks and nothing else.
        """
        import deepspeed  # not before `join_world` has set what it reads at import

        # One weight at a time: `initialize` alone would first move the whole model to the device.
        deepspeed.zero.Init(module=self, config_dict_or_path=engine_config)
        engine, *_ = deepspeed.initialize(model=self, config=engine_config)
        self._engines.append(engine)

    @property
    def sharded(self) -> bool:
        """Whether the weights are partitioned over the ranks."""
        return bool(self._engines)

    @torch.no_grad()
    def embed(self, ids_N: Tensor) -> Tensor:
        """All ranks: rows of the embedding table, [N, D] in fp32."""
        table = self.model.get_input_embeddings().weight  # type: ignore[operator]
        with self._gathered(table):
            return table[ids_N.to(table.device)].float()

    def release(self) -> None:
        """Drop what a backward pass left gathered (DeepSpeed keeps the shared embedding)."""
        for engine in self._engines:
            engine.optimizer.release_backward_leftovers()

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])


class Seq2SeqBackbone(Backbone):
    """T5 and its like: [prompt ; input ; padding] to the encoder, target to the decoder."""

    family: Family = "seq2seq"

    def _logits(self, prompt_BPD: Tensor, embeds_BSD: Tensor, batch: TokenBatch) -> Tensor:
        decoder_ids_BT = torch.full_like(batch.target_ids_BT, self.config.decoder_start_token_id)
        decoder_ids_BT[:, 1:] = batch.target_ids_BT[:, :-1]
        return self.model(
            inputs_embeds=torch.cat([prompt_BPD, embeds_BSD], dim=1),
            attention_mask=_with_prompt(prompt_BPD, batch.input_mask_BS),
            decoder_input_ids=decoder_ids_BT,
            use_cache=False,
        ).logits


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

    def _logits(self, prompt_BPD: Tensor, embeds_BSD: Tensor, batch: TokenBatch) -> Tensor:
        embeds_BTD = self.model.get_input_embeddings()(batch.target_ids_BT)  # type: ignore[operator]
        mask = torch.cat(
            [_with_prompt(prompt_BPD, batch.input_mask_BS), batch.target_mask_BT], dim=1
        ).long()
        num_targets = batch.target_ids_BT.shape[1]
        logits = self.model(
            inputs_embeds=torch.cat([prompt_BPD, embeds_BSD, embeds_BTD], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=num_targets + 1,
        ).logits
        return logits[:, -num_targets - 1 : -1]


def _with_prompt(prompt_BPD: Tensor, mask_BS: Tensor) -> Tensor:
    """Prompt positions are always visible (prompt-tuning `masks.py`)."""
    return torch.cat([mask_BS.new_ones(prompt_BPD.shape[:2]), mask_BS], dim=1)
