"""Small random backbones for the tests. The T5's head is its own: a tied model proves nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration


def make_t5(vocab_size: int = 128, seed: int = 0, d_model: int = 32) -> T5ForConditionalGeneration:
    """A T5 v1.1 whose lm_head differs from its embedding."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            dropout_rate=0.1,
        )
    )
    model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab_size, d_model) * d_model**-0.5)
    return model.eval()


def make_llama(vocab_size: int = 128, seed: int = 0) -> LlamaForCausalLM:
    """A decoder-only model with a tied head, as small models of that family have."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()


def save_model(model: torch.nn.Module, folder: Path) -> Path:
    """Write a Hugging Face folder."""
    model.save_pretrained(str(folder))
    return folder
