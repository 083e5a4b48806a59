"""Public models by name, so that they can be planned for without network or weights."""

from __future__ import annotations

from typing import Any

from softprompt_dist.backbone.architecture import Architecture, architecture_of


def _t5_v11(**sizes: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_kv": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        **sizes,
    }


def _llama(dtype: str = "bfloat16", **sizes: int) -> dict[str, Any]:
    return {"model_type": "llama", "dtype": dtype, **sizes}


_T5_SIZES = {
    "small": _t5_v11(d_model=512, d_ff=1024, num_heads=6, num_layers=8),
    "base": _t5_v11(d_model=768, d_ff=2048, num_heads=12, num_layers=12),
    "large": _t5_v11(d_model=1024, d_ff=2816, num_heads=16, num_layers=24),
    "xl": _t5_v11(d_model=2048, d_ff=5120, num_heads=32, num_layers=24),
    "xxl": _t5_v11(d_model=4096, d_ff=10240, num_heads=64, num_layers=24),
}
_LLAMA_7B = _llama(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_hidden_layers=32,
    vocab_size=32000,
)
_LLAMA_70B = _llama(
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    num_hidden_layers=80,
    vocab_size=32000,
)
_CONFIGS = {
    **{f"google/t5-{size}-lm-adapt": config for size, config in _T5_SIZES.items()},
    **{f"google/t5-v1_1-{size}": config for size, config in _T5_SIZES.items()},
    **{f"google/flan-t5-{size}": config for size, config in _T5_SIZES.items()},
    "huggyllama/llama-7b": _LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_7B,
    "meta-llama/Llama-2-70b-hf": _LLAMA_70B,
    "meta-llama/Llama-3.1-8B": {
        **_LLAMA_7B,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "meta-llama/Llama-3.1-70B": {**_LLAMA_70B, "vocab_size": 128256},
    "demo:smollm2-135m": _llama(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=30,
        vocab_size=49152,
        tie_word_embeddings=True,
        dtype="float32",
    ),
}


def known_names() -> list[str]:
    """All names that `known_architecture` answers to."""
    return list(_CONFIGS)


def known_architecture(name: str) -> Architecture | None:
    """The architecture of a public model, from its published config.json; None if not listed."""
    config = _CONFIGS.get(name)
    return None if config is None else architecture_of(name, config)
