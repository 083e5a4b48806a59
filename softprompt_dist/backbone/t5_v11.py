"""A new T5 v1.1 with random weights, of which each rank draws only what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import T5Config

from softprompt_dist.adapt_config import ArchitectureConfig

DROPOUT_RATE = 0.1
"""What the public checkpoints of T5 v1.1 carry, for those who fine-tune them."""


_CHUNK = 2**20
"""Elements that one generator draws."""


def t5_config(
    architecture: ArchitectureConfig, vocabulary_size: int, pad: int = 0, eos: int = 1
) -> T5Config:
    """The Hugging Face configuration of a T5 v1.1, whose decoder begins with padding."""
    return T5Config(
        vocab_size=vocabulary_size,
        feed_forward_proj="gated-gelu",
        dropout_rate=DROPOUT_RATE,
        decoder_start_token_id=pad,
        pad_token_id=pad,
        eos_token_id=eos,
        tie_word_embeddings=False,  # so that the head's inputs are not scaled, as in T5 v1.1
        **architecture.model_dump(),
    )


def draw_weights(
    config: T5Config, seed: int, name: str, numel: int, part: range
) -> Iterator[Tensor]:
    """A part of a flattened weight, some elements at a time, in fp32.

    Distributed as transformers initialises a T5, the head's with standard deviation
    d_model ** -0.5. Every chunk of a weight has a generator of its own, so a weight is the same
    however it is cut, and no rank draws more than its part.

    Args:
        config: of the model.
        seed: of all weights together.
        name: of the weight in a checkpoint.
        numel: elements of the whole weight.
        part: indices in the flattened weight.
    """
    deviation = _deviation(config, name)
    for start in range(part.start - part.start % _CHUNK, part.stop, _CHUNK):
        size = min(_CHUNK, numel - start)
        if deviation is None:
            values = torch.full((size,), config.initializer_factor)
        else:
            digest = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            values = torch.empty(size).normal_(0.0, deviation, generator=generator)
        yield values[max(part.start - start, 0) : part.stop - start]


def _deviation(config: T5Config, name: str) -> float | None:
    """Of a weight's normal distribution; None for the scale of a norm, which is no random number.

    As T5PreTrainedModel._init_weights; Mesh TensorFlow's, but for the head.
    """
    *_, kind, _ = name.split(".")
    inverse_variances = {
        "shared": 1,
        "q": config.d_model * config.d_kv,
        "o": config.num_heads * config.d_kv,
        "wo": config.d_ff,
    }
    if kind.endswith("layer_norm"):
        return None
    return float(config.initializer_factor * inverse_variances.get(kind, config.d_model) ** -0.5)
