"""One interface, two shapes: a frozen model that takes a prompt before its input.

Axes: B batch, P prompt, S input tokens, T target tokens, D model width, V vocabulary.

A batch row brings its own prompt (prompt_BPD), so that nothing below assumes that one prompt
serves all rows. Call the backbone itself, never its submodules: ZeRO-3 gathers weights in hooks
that start there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.backbone.embedding import FrozenEmbedding
from softprompt_dist.backbone.flat_weights import FrozenBlock, held_part
from softprompt_dist.backbone.traffic import Traffic
from softprompt_dist.data.batching import Family, TokenBatch
from softprompt_dist.identity import Identity


@dataclass(frozen=True)
class PositionLimit:
    """Most positions that prompt, input and target may take together."""

    positions: int
    reason: str
    """As a message says it: "the backbone has 512"."""


@dataclass(frozen=True)
class Reading:
    """Prompt and input as read, with what of the answer there is so far."""

    logits_BV: Tensor
    """Of the token to come."""
    state: Any
    """What the backbone holds of what was read; it grows with the answer."""


class Backbone(nn.Module, ABC):
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
        """Without the tokenizer, which is not read with the weights."""
        self.traffic = Traffic()
        """What this rank has received to bring sharded weights in."""
        self.engine_config: dict[str, Any] | None = None
        """What DeepSpeed is given, for a sharded backbone."""
        # In a list, so that the engine (itself a module that holds this one) is not registered as a
        # child; kept, because a collected engine removes its hooks.
        self.engines: list[Any] = []

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
    def position_limit(self) -> PositionLimit | None:
        """How long a row may be; None for no limit."""
        return None

    def forward(self, *inputs: Any, part: Callable[..., Any] | None = None) -> Any:
        """Logits of the target tokens given (prompt_BPD, batch).

        Args:
            *inputs: of `part`.
            part: what to run instead of the whole, as a forward pass of this module, which is where
                ZeRO-3's hooks begin; for this class's own use.

        Returns:
            logits_BTV in the backbone's dtype; position t predicts `batch.target_ids_BT[:, t]`.
        """
        return (part or self._logits)(*inputs)

    def read(self, prompt_BPD: Tensor, batch: TokenBatch) -> Reading:
        """Read prompt and input, to answer token by token; the batch's targets are left aside."""
        reading: Reading = self(prompt_BPD, batch, part=self._read)
        return reading

    def extend(self, reading: Reading, ids_B: Tensor) -> Reading:
        """The reading after each row's answer has grown by a token; the old one is spent."""
        longer: Reading = self(reading, ids_B, part=self._extend)
        return longer

    @torch.no_grad()
    def score_answers(
        self,
        prompt_BPD: Tensor,
        batch: TokenBatch,
        chunks: Sequence[Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        """What `score` makes of given answers to each row; the input is read once.

        Args:
            prompt_BPD: as for `forward`.
            batch: as for `forward`; its targets are left aside.
            chunks: answers_LT, padded to T tokens; L may differ. Chunks are computed one after the
                other, so that memory is needed for one. All ranks of a sharded backbone must give
                as many.
            score: of (logits_BLTV, answers_LT); logits behind an answer's last token mean nothing.

        Returns:
            what `score` gave for each chunk.
        """

        def part() -> list[Tensor]:
            logits = self._answer_logits(prompt_BPD, batch, chunks)
            return [score(*pair) for pair in zip(logits, chunks, strict=True)]

        scores: list[Tensor] = self(part=part)
        return scores

    def _embedded(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        """Prompt and input side by side, [B, P + S, D]."""
        embeds_BSD = self.embedding(batch.input_ids_BS)
        return torch.cat([prompt_BPD.to(embeds_BSD.dtype), embeds_BSD], dim=1)

    @abstractmethod
    def _logits(self, prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
        """`forward`, for this shape."""

    @abstractmethod
    def _read(self, prompt_BPD: Tensor, batch: TokenBatch) -> Reading:
        """`read`, for this shape."""

    @abstractmethod
    def _extend(self, reading: Reading, ids_B: Tensor) -> Reading:
        """`extend`, for this shape."""

    @abstractmethod
    def _answer_logits(
        self, prompt_BPD: Tensor, batch: TokenBatch, chunks: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """logits_BLTV of each chunk of answers, for this shape."""

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

    def tensors(self) -> dict[str, Tensor]:
        """Name -> every parameter and buffer, also those inside blocks, which `modules()` hides."""
        blocks = [(n, m) for n, m in self.named_modules() if isinstance(m, FrozenBlock)]
        found: dict[str, Tensor] = {}
        for root, module in [("", self), *((n, block.computation) for n, block in blocks)]:
            prefix = f"{root}." if root else ""
            held = (*module.named_parameters(), *module.named_buffers())
            found |= {f"{prefix}{name}": tensor for name, tensor in held}
        if self.engine_config is None:  # else it is the checkpoint's own file, mapped
            found["embedding"] = self.embedding.table_VD
        return found

    def held_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of all that this rank holds; under ZeRO-3 its parts.

        A part that lies on a disk is in memory until the next one is asked for.
        """
        for name, tensor in self.tensors().items():
            with held_part(tensor) as held:
                yield name, held

    def embed(self, ids_N: Tensor) -> Tensor:
        """What the model sees of tokens, [N, D] in fp32: rounded as the activations are."""
        return self.embedding(ids_N).float()

    def release(self) -> None:
        """Drop what a backward pass left gathered."""
        for engine in self.engines:
            engine.optimizer.release_backward_leftovers()


def mask_with_prompt(prompt_BPD: Tensor, batch: TokenBatch) -> Tensor:
    """mask_BL of prompt and input on the host; prompt positions are always visible.

    As in prompt-tuning's `masks.py`.
    """
    mask_BS = batch.input_mask_BS
    return torch.cat([mask_BS.new_ones(prompt_BPD.shape[:2]), mask_BS], dim=1)
