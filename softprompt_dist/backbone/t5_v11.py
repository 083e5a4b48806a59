"""T5 v1.1 with a head of its own, to train all of it; transformers >= 5 would tie a fresh one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from softprompt_dist.adapt_config import ArchitectureConfig
from softprompt_dist.errors import BackboneError


class T5V11(T5ForConditionalGeneration):
    """T5 whose embeddings are shared by encoder and decoder, but not by the head."""

    _tied_weights_keys = {  # noqa: RUF012 - the name and the type are the parent's
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def new_t5(
    architecture: ArchitectureConfig, vocabulary_size: int, dropout: float, seed: int
) -> T5V11:
    """A T5 v1.1 with random weights; the head's have standard deviation d_model ** -0.5."""
    config = T5Config(
        vocab_size=vocabulary_size,
        feed_forward_proj="gated-gelu",
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,  # so that the head's inputs are not scaled, as in T5 v1.1
        **architecture.model_dump(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5V11(config)
        torch.nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    return model


def read_t5(folder: Path, dropout: float) -> T5V11:
    """A T5 v1.1 checkpoint, with all weights in fp32.

    Raises:
        BackboneError: unreadable, not a T5 v1.1, or weights are missing.
    """
    try:
        model, info = T5V11.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            dropout_rate=dropout,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BackboneError(f"Cannot read a T5 from {folder}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing or not model.config.is_gated_act:
        raise BackboneError(
            f"{folder} is not a whole T5 v1.1 (gated feed-forward, a head of its own); missing "
            f"weights: {missing[:5]}. Set `backbone` to a T5 v1.1 or LM-adapted folder."
        )
    return model
