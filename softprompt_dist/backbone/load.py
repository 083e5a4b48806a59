"""From a recipe's backbone section to a frozen backbone, replicated or sharded."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from softprompt_dist.backbone.base import Backbone, CausalBackbone, Seq2SeqBackbone
from softprompt_dist.backbone.checkpoint_tensors import assert_all_arrived
from softprompt_dist.backbone.demo import resolve_backbone
from softprompt_dist.backbone.engine import engine_config
from softprompt_dist.backbone.fingerprint import identity
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError
from softprompt_dist.parallel import ranks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DROPOUT_NAMES = (
    "dropout_rate",
    "dropout",
    "activation_dropout",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED_WEIGHTS = ("*.bin", "*.bin.index.json")
_TOKENIZER_AND_CONFIG = ("*.json", "*.model", "*.txt")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError)


def locate_backbone(config: BackboneConfig) -> Path:
    """All ranks: the folder of the backbone's files; rank 0 fetches or converts where needed.

    Raises:
        BackboneError: no such folder, demo name or hub name.
    """
    ranks.on_main(lambda: str(_locate(config)))
    # Again on every rank: a node that does not share rank 0's cache fetches its own copy.
    return ranks.together(lambda: _locate(config))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights.

    Raises:
        BackboneError: none there, or unreadable.
    """
    # Without these, transformers makes up a T5 tokenizer that knows hardly any piece.
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise BackboneError(
            f"No tokenizer in {folder}: it needs tokenizer.json, or a vocabulary such as "
            "spiece.model. Copy the one that belongs to the backbone there."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BackboneError(f"No usable tokenizer in {folder}: {error}") from error


def load_backbone(config: BackboneConfig, ds_config: dict[str, Any] | None = None) -> Backbone:
    """All ranks: read the frozen model whole, prove that it is, then shard or move it.

    Raises:
        BackboneError: unreadable, incomplete or unsupported checkpoint.
    """
    folder = locate_backbone(config)
    backbone = ranks.together(lambda: _read(folder, config))
    if config.sharding == "zero3":
        backbone.shard(engine_config(config, ds_config))
    else:
        backbone.to(ranks.device())
    return backbone.train(config.dropout > 0)


def _locate(config: BackboneConfig) -> Path:
    folder = Path(resolve_backbone(config.path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"Backbone folder {folder} has no config.json.")
        return folder
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise BackboneError(f"Backbone folder {config.path!r} does not exist. Set backbone.path.")
    return _from_hub(config)


def _from_hub(config: BackboneConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=list(patterns))
        )

    try:
        folder = fetch(_TOKENIZER_AND_CONFIG + _WEIGHTS)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(_TOKENIZER_AND_CONFIG + _PICKLED_WEIGHTS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"Backbone {config.path!r} is neither a folder nor reachable on the hub ({reason}). "
            "Set backbone.path to a Hugging Face folder on disk, or fetch it once on a "
            "machine with network."
        ) from error
    return folder


def _read(folder: Path, config: BackboneConfig) -> Backbone:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in raw:
            raise BackboneError(
                f"{folder}/config.json asks for code of its own (auto_map), which is never run."
            )
        model_config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        for name in _DROPOUT_NAMES:
            if hasattr(model_config, name):
                setattr(model_config, name, config.dropout)
        seq2seq = model_config.is_encoder_decoder
        family = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        model = family.from_pretrained(
            str(folder), config=model_config, dtype=_DTYPES[config.dtype], local_files_only=True
        )
    except pickle.UnpicklingError as error:
        # Its own words advise to run whatever the file holds.
        raise BackboneError(
            f"Cannot load backbone {folder}: pytorch_model.bin is damaged or holds more than "
            "tensors (code in it is never run). Fetch it again, or use a safetensors checkpoint."
        ) from error
    except _UNREADABLE as error:
        reason = str(error) or "a file is empty or cut short"
        raise BackboneError(f"Cannot load backbone {folder}: {reason}") from error
    if seq2seq and model_config.decoder_start_token_id is None:
        raise BackboneError(f"{folder}/config.json needs decoder_start_token_id (0 for T5).")
    assert_all_arrived(model, folder, tied_head=not _has_own_head(raw))
    shape = Seq2SeqBackbone if seq2seq else CausalBackbone
    return shape(model, fingerprint=identity(model), path=config.path)


def _has_own_head(raw: dict[str, Any]) -> bool:
    """Whether config.json promises a head that is not the embedding."""
    # transformers 5 writes tie_word_embeddings true for every T5; v1.1 is known by the second key.
    return raw.get("tie_word_embeddings") is False or raw.get("scale_decoder_outputs") is False
