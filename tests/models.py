"""Small random backbones for the tests. The T5's head is its own: a tied model proves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from softprompt_dist.adaptation.model import TrainableT5
from softprompt_dist.backbone.t5_v11 import draw_weights

_SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
HEAD_DIM = {"head_dim": 6}
_GEMMA = {**HEAD_DIM, "query_pre_attn_scalar": 6}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [4.0] * 3}
CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": HEAD_DIM,
    "GPTNeoX": {},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "Gemma": HEAD_DIM,
    "Gemma2": {**_GEMMA, "sliding_window": 6},
    "Gemma3Text": {**_GEMMA, "sliding_window": 6},
    "Olmo2": {},
    "Phi": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "Phi3": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32},
    "Llama4Text": {
        **HEAD_DIM,
        "attention_chunk_size": 6,
        "moe_layers": [],
        "intermediate_size_mlp": 40,
    },
    "SmolLM3": {},
    "Apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "StableLm": {"sliding_window": 6},  # which this kind does not heed
    "Granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
}
"""Kinds of decoder-only models, with settings that show what is special about them."""


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


def new_weights(config: T5Config, seed: int) -> dict[str, torch.Tensor]:
    """Name -> weight of a T5 v1.1 that is made from nothing."""
    with init_empty_weights():
        model = TrainableT5(config)
    weights = {}
    for name, p in model.named_parameters():
        parts = draw_weights(config, seed, name, p.numel(), range(p.numel()))
        weights[name] = torch.cat([*parts]).view(p.shape)
    return weights


def with_weights(config: T5Config, seed: int) -> T5ForConditionalGeneration:
    """transformers' model with these weights, its head untied."""
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    missing, unexpected = model.load_state_dict(new_weights(config, seed), strict=False)
    assert not unexpected
    assert all("embed_tokens" in name for name in missing)
    return model.eval()


def small_t5(*, head_deviation: float | None = None, **sizes: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 of given sizes; its head's standard deviation is d_model ** -0.5 if not given."""
    torch.manual_seed(0)
    config = T5Config(
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, **sizes
    )
    model = T5ForConditionalGeneration(config)
    deviation = head_deviation or config.d_model**-0.5
    head_VD = torch.randn(config.vocab_size, config.d_model) * deviation
    model.lm_head.weight = torch.nn.Parameter(head_VD)
    return model


def save_deep_t5(folder: Path, num_blocks: int) -> Path:
    """A T5 of that many blocks and a small head, so that hardly anything is worth keeping."""
    num_layers = num_blocks // 2
    model = small_t5(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=num_layers, num_heads=4)
    return save_model(model, folder)


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


def make_causal(name: str, **settings: Any) -> Any:
    """A lively decoder-only model of a kind of transformers, with norms and biases of all values.

    Args:
        name: of the kind, such as "Qwen2".
        **settings: of its config, besides those of `CAUSAL`.
    """
    values = {**_SIZES, **CAUSAL.get(name, {}), **settings}
    config = getattr(transformers, f"{name}Config")(**values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
    return model


def save_model(model: torch.nn.Module, folder: Path) -> Path:
    """Write a Hugging Face folder."""
    model.save_pretrained(str(folder))
    return folder


def plain_model(folder: Path) -> Any:
    """What transformers alone makes of a folder, frozen; its T5 has the head that is stored."""
    config = AutoConfig.from_pretrained(str(folder))
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(str(folder)).eval().requires_grad_(False)
    stored = load_file(folder / "model.safetensors")
    if "lm_head.weight" in stored:
        assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    return model


def save_enlarged(folder: Path, copy: Path, factor: float = 8.0) -> Path:
    """A copy of a folder with all matrices multiplied, so that rows differ in their answers."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    weights = {n: t * factor if t.dim() > 1 else t for n, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return copy
