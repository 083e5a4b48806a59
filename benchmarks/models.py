"""Randomly initialised T5 v1.1 checkpoints of any size, written piece by piece.

The head is its own and different from the embedding, as in every T5 v1.1: a loader that ties them
loads another model, and a benchmark must notice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

TINY_TOKENIZER = Path(__file__).parents[1] / "softprompt_dist" / "assets" / "tiny-t5"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = "lm_head.weight"

_T5_SMALL_WIDTH = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6}
_T5_LARGE_WIDTH = {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_heads": 16}
_T5_BASE_WIDTH = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12}
_T5_XL_WIDTH = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32}
_T5_XXL_WIDTH = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
_TINY_WIDTH = {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_heads": 4}
_TIED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_VOCABULARY = 32128
_SHARD_BYTES = 1_000_000_000


def _shape(
    width: Mapping[str, int], encoder_layers: int, decoder_layers: int, vocabulary: int
) -> dict[str, int]:
    layers = {"num_layers": encoder_layers, "num_decoder_layers": decoder_layers}
    return {**width, **layers, "vocab_size": vocabulary}


SHAPES = {
    "tiny": _shape(_TINY_WIDTH, 2, 2, 6272),
    "24+24 tiny layers": _shape(_TINY_WIDTH, 24, 24, 256),
    "28m": _shape(_T5_SMALL_WIDTH, 4, 4, 6272),
    "77m": _shape(_T5_SMALL_WIDTH, 8, 8, _VOCABULARY),
    "200m": _shape(_T5_BASE_WIDTH, 9, 9, _VOCABULARY),
    "1.4b": _shape(_T5_XL_WIDTH, 12, 11, _VOCABULARY),
    "xxl": _shape(_T5_XXL_WIDTH, 24, 24, _VOCABULARY),
}
"""Name -> settings of a T5Config. `77m`: as T5 v1.1 small, and `28m` as wide; `200m`: 198 M;
`1.4b`: 1.43 B; `xxl`: 11.14 B."""


def layers_of(num_encoder_layers: int, *, tiny: bool = False) -> dict[str, int]:
    """A shape of T5 large's width with one decoder layer; two of them tell what a layer costs."""
    return _shape(_TINY_WIDTH if tiny else _T5_LARGE_WIDTH, num_encoder_layers, 1, 256)


def t5_config(shape: Mapping[str, int]) -> T5Config:
    """The Hugging Face config of a shape, without dropout."""
    return T5Config(
        **shape,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )


def num_parameters(shape: Mapping[str, int]) -> int:
    """Number of parameters, the tied embeddings counted once and the head as well."""
    return sum(tensor.numel() for tensor in _tensors_on_meta(shape).values())


def num_parameters_in(folder: Path) -> int:
    """Number of parameters of a checkpoint that `ensure_checkpoint` wrote."""
    shape = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    return num_parameters({k: v for k, v in shape.items() if k in SHAPES["tiny"]})


def ensure_checkpoint(
    folder: Path, shape: Mapping[str, int], dtype: str, *, device: str = "cpu", seed: int = 0
) -> Path:
    """The folder with this checkpoint and a tokenizer; written now unless it is there already.

    At most one file's worth of tensors (1 GB) is in memory at a time.

    Args:
        folder: a Hugging Face folder; config.json is written last, so a half-written one is redone.
        shape: settings of a T5Config.
        dtype: `fp32` or `bf16`, of the file.
        device: where values are drawn; the same seed draws other values on another device.
        seed: of the values.
    """
    wanted = {**shape, "dtype": dtype, "seed": seed, "device": device}
    marker = folder / "benchmark.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_weights(folder, shape, DTYPES[dtype], torch.Generator(device).manual_seed(seed))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_TOKENIZER / name, folder / name)
    config = t5_config(shape).to_dict()
    # As T5 v1.1's own config.json says, and not what transformers makes of it.
    config |= {"tie_word_embeddings": False, "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    marker.write_text(json.dumps(wanted), encoding="utf-8")
    return folder


def warm_page_cache(folder: Path) -> int:
    """Read every weight file once, so that no variant pays for the disk; returns their bytes."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := len(file.read(1 << 24)):
                total += count
    return total


def _write_weights(
    folder: Path, shape: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    tensors = _tensors_on_meta(shape)
    parts = list(_parts(tensors, dtype.itemsize))
    places: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        values = {n: _draw(n, tensors[n].shape, generator).to(dtype).cpu() for n in names}
        save_file(values, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _tensors_on_meta(shape: Mapping[str, int]) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = T5ForConditionalGeneration(t5_config(shape)).state_dict()
    return {name: tensor for name, tensor in state.items() if name not in _TIED_COPIES}


def _parts(tensors: Mapping[str, Tensor], itemsize: int) -> Iterator[list[str]]:
    """Names in files of at most `_SHARD_BYTES`, or of one tensor."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.numel() * itemsize > _SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.numel() * itemsize
    yield part


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of T5's initial size, so that activations neither vanish nor overflow."""
    if len(shape) == 1:
        return torch.ones(shape, device=generator.device)
    scale = 1.0 if name == "shared.weight" else shape[1] ** -0.5
    if name.endswith((".q.weight", "relative_attention_bias.weight")):
        scale /= 8.0  # T5 does not divide by the root of d_kv, so its q starts small
    return torch.randn(shape, generator=generator, device=generator.device) * scale
