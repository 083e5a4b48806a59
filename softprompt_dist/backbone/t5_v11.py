"""A new T5 v1.1 with random weights."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from softprompt_dist.adapt_config import ArchitectureConfig

DROPOUT_RATE = 0.1
"""What the public checkpoints of T5 v1.1 carry, for those who fine-tune them."""


class T5V11(T5ForConditionalGeneration):
    """T5 whose embeddings are shared by encoder and decoder, but not by the head.

    transformers >= 5 would tie the head of a fresh model.
    """

    _tied_weights_keys = {  # noqa: RUF012 - the name and the type are the parent's
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


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


def new_t5(config: T5Config, seed: int) -> T5V11:
    """A model with random weights; the head's have standard deviation d_model ** -0.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5V11(config)
        torch.nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    return model


def initial_weights(config: T5Config, seed: int) -> dict[str, Tensor]:
    """Name -> weight of `new_t5`, each once."""
    return {name: weight.detach() for name, weight in new_t5(config, seed).named_parameters()}
