"""The numbers of a model that decide its memory and its speed, from config.json alone.

No torch: reading them takes milliseconds and needs neither weights nor a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from softprompt_dist.errors import BackboneError

_SEQ2SEQ_TYPES = ("t5", "mt5")
_CAUSAL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mt5": {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""What transformers takes for keys that a config.json leaves out, where kinds differ."""
_TWO_BYTE_DTYPES = ("float16", "bfloat16")


class _Reader(Protocol):
    """Reads a positive integer of a config.json."""

    def __call__(self, key: str, default: int | None = None) -> int: ...


@dataclass(frozen=True)
class Matrix:
    """A frozen weight of a block, [num_rows, num_columns] with the outputs as rows."""

    num_rows: int
    num_columns: int
    role: Literal["attention", "cross", "feed_forward", "feed_forward_out", "head"] = "attention"
    """cross: makes keys or values of the encoder's output; the second feed-forward matrix (T5 `wo`,
    Llama `down_proj`) is feed_forward_out."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Architecture:
    """A T5 or a decoder-only model of Llama's kind, in numbers."""

    name: str
    family: Literal["seq2seq", "causal"]
    d_model: int
    d_ff: int
    num_heads: int
    d_kv: int
    """Width of one head."""
    num_key_value_heads: int
    """Less than `num_heads` where heads share keys and values."""
    num_layers: int
    """Of the encoder, or of the decoder-only model."""
    num_decoder_layers: int
    """0 for a decoder-only model."""
    vocabulary_size: int
    gated: bool
    """Whether the feed-forward part has two input matrices."""
    tied_head: bool
    """Whether the head is the embedding table."""
    relative_position_buckets: int = 0
    layer_biases: int = 0
    """Numbers in the biases of one layer."""
    head_norms: bool = False
    """Whether queries and keys are normalised, as in Qwen3."""
    checkpoint_bytes_per_weight: int = 4
    """In the published checkpoint: 4 (fp32) or 2 (bf16, fp16)."""

    @property
    def attention_width(self) -> int:
        """Of queries, all heads together."""
        return self.num_heads * self.d_kv

    @property
    def key_value_width(self) -> int:
        """Of keys, all heads together."""
        return self.num_key_value_heads * self.d_kv

    @property
    def layer(self) -> tuple[Matrix, ...]:
        """Weights of one layer of the encoder, or of the decoder-only model."""
        return (*self._attention(cross=False), *self._feed_forward())

    @property
    def decoder_layer(self) -> tuple[Matrix, ...]:
        """Weights of one layer of the decoder behind an encoder."""
        return (
            *self._attention(cross=False),
            *self._attention(cross=True),
            *self._feed_forward(),
        )

    @property
    def head(self) -> Matrix:
        """Hidden state to logits."""
        return Matrix(self.vocabulary_size, self.d_model, "head")

    def blocks(self) -> Iterator[tuple[Matrix, ...]]:
        """The weights in the order of use, cut where they are gathered; the head is the last."""
        yield from (self.layer,) * self.num_layers
        yield from (self.decoder_layer,) * self.num_decoder_layers
        yield (self.head,)

    @property
    def embedding_size(self) -> int:
        """Weights of the input embedding."""
        return self.vocabulary_size * self.d_model

    @property
    def small_size(self) -> int:
        """Weights of norms, biases and relative positions, which every device holds whole."""
        norms_per_layer = self.d_model * 2 + (2 * self.d_kv if self.head_norms else 0)
        norms = self.num_layers * norms_per_layer + self.num_decoder_layers * 3 * self.d_model
        stacks = 2 if self.num_decoder_layers else 1
        relative = stacks * self.relative_position_buckets * self.num_heads
        return norms + stacks * self.d_model + relative + self.num_layers * self.layer_biases

    @property
    def num_parameters(self) -> int:
        """All weights; a tied head counts once."""
        head = 0 if self.tied_head else self.head.size
        layers = self.num_layers * _size(self.layer)
        layers += self.num_decoder_layers * _size(self.decoder_layer)
        return layers + self.embedding_size + head + self.small_size

    def _attention(self, *, cross: bool) -> tuple[Matrix, ...]:
        outer = Matrix(self.attention_width, self.d_model)
        inner = Matrix(self.key_value_width, self.d_model, "cross" if cross else "attention")
        return (outer, inner, inner, Matrix(self.d_model, self.attention_width))

    def _feed_forward(self) -> tuple[Matrix, ...]:
        into = Matrix(self.d_ff, self.d_model, "feed_forward")
        out = Matrix(self.d_model, self.d_ff, "feed_forward_out")
        return (into, into, out) if self.gated else (into, out)


def architecture_of(name: str, config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes; of keys it leaves out, as transformers has it.

    Raises:
        BackboneError: a kind of model we have no numbers for, or a key is missing or no positive
            integer.
    """
    kind = config.get("model_type")
    config = {**_DEFAULTS.get(str(kind), {}), **config}
    if kind in _SEQ2SEQ_TYPES:
        return _t5(name, config)
    if kind in _CAUSAL_TYPES:
        return _llama_like(name, str(kind), config)
    raise BackboneError(
        f"{name}: there are no numbers for model_type {kind!r}. Planning knows "
        f"{', '.join(_SEQ2SEQ_TYPES + _CAUSAL_TYPES)}; plan with a model of the same size, such as "
        "--model meta-llama/Llama-2-7b-hf."
    )


def _t5(name: str, config: Mapping[str, Any]) -> Architecture:
    number = _reader(name, config)
    heads = number("num_heads")
    layers = number("num_layers")
    # transformers 5 writes tie_word_embeddings true for every T5; v1.1 is known by the second key.
    own_head = (
        config.get("tie_word_embeddings") is False or config.get("scale_decoder_outputs") is False
    )
    is_gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    return Architecture(
        name=name,
        family="seq2seq",
        d_model=number("d_model"),
        d_ff=number("d_ff"),
        num_heads=heads,
        d_kv=number("d_kv", 64),
        num_key_value_heads=heads,
        num_layers=layers,
        num_decoder_layers=number("num_decoder_layers", layers),
        vocabulary_size=number("vocab_size"),
        gated=bool(config.get("is_gated_act", is_gated)),
        tied_head=not own_head,
        relative_position_buckets=number("relative_attention_num_buckets", 32),
        checkpoint_bytes_per_weight=_checkpoint_bytes(config),
    )


def _llama_like(name: str, kind: str, config: Mapping[str, Any]) -> Architecture:
    number = _reader(name, config)
    d_model = number("hidden_size")
    heads = number("num_attention_heads")
    key_value_heads = number("num_key_value_heads", heads)
    d_kv = number("head_dim", d_model // heads)
    d_ff = number("intermediate_size")
    into_heads = (heads + 2 * key_value_heads) * d_kv
    biases = into_heads if kind == "qwen2" else 0
    if kind in ("llama", "qwen3") and config.get("attention_bias"):
        biases += into_heads + d_model
    if kind == "llama" and config.get("mlp_bias"):
        biases += 2 * d_ff + d_model
    return Architecture(
        name=name,
        family="causal",
        d_model=d_model,
        d_ff=d_ff,
        num_heads=heads,
        d_kv=d_kv,
        num_key_value_heads=key_value_heads,
        num_layers=number("num_hidden_layers"),
        num_decoder_layers=0,
        vocabulary_size=number("vocab_size"),
        gated=True,
        tied_head=config.get("tie_word_embeddings") is True,
        layer_biases=biases,
        head_norms=kind == "qwen3",
        checkpoint_bytes_per_weight=_checkpoint_bytes(config),
    )


def _reader(name: str, config: Mapping[str, Any]) -> _Reader:
    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BackboneError(
                f"{name}: config.json has {key}={value!r}, which must be a whole number of at "
                f"least 1 in a {config.get('model_type')} model. Fetch config.json again."
            )
        return value

    return number


def _checkpoint_bytes(config: Mapping[str, Any]) -> int:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return 2 if dtype.removeprefix("torch.") in _TWO_BYTE_DTYPES else 4


def _size(matrices: tuple[Matrix, ...]) -> int:
    return sum(matrix.size for matrix in matrices)
