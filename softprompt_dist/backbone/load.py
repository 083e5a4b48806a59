"""From a recipe's backbone section to a frozen backbone, in whichever cell of the table."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from softprompt_dist.backbone.arrival import assert_all_arrived
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.demo import resolve_backbone
from softprompt_dist.backbone.embedding import FrozenEmbedding
from softprompt_dist.backbone.filling import embedding_of, fill, identity_of
from softprompt_dist.backbone.inventory import Inventory, take_inventory
from softprompt_dist.backbone.offload import assert_offload_possible
from softprompt_dist.backbone.skeleton import Skeleton, build_skeleton
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import Family
from softprompt_dist.data.encoding import special_pieces
from softprompt_dist.errors import BackboneError, SoftpromptError
from softprompt_dist.identity import Accept, Identity, accept_any
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.deepspeed_start import start_deepspeed
from softprompt_dist.parallel.groups import shard_group
from softprompt_dist.private_names import assert_known
from softprompt_dist.progress import phase
from softprompt_dist.untrusted import open_regular

log = logging.getLogger(__name__)

DROPOUT_NAMES = (
    "dropout_rate",
    "dropout",
    "activation_dropout",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
"""What configurations of models call the dropout of one or the other place."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED_WEIGHTS = ("*.bin", "*.bin.index.json")
_TOKENIZER_AND_CONFIG = ("*.json", "*.model", "*.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "config.json")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")


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
        BackboneError: none there, or unreadable, or with pieces that the backbone beside it lacks.
    """
    # Without these, transformers makes up a T5 tokenizer that knows hardly any piece.
    vocabularies = [path for pattern in _VOCABULARIES for path in folder.glob(pattern)]
    if not vocabularies and not _reads_bytes(folder):
        raise BackboneError(
            f"No tokenizer in {folder}: it needs tokenizer.json, or a vocabulary such as "
            "spiece.model. Copy the one that belongs to the backbone there."
        )
    try:
        for path in [*vocabularies, *_settings(folder)]:
            open_regular(path).close()
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BackboneError(f"No usable tokenizer in {folder}: {error}") from error
    if (folder / "config.json").is_file():
        model_config = model_config_of(folder)
        if beyond := pieces_without_a_row(tokenizer, model_config):
            raise BackboneError(
                f"The tokenizer in {folder} has {len(beyond)} pieces, such as {beyond[0]!r}, "
                f"beyond the {model_config.vocab_size} rows of the embedding table (vocab_size "
                "in config.json). Take the tokenizer that belongs to it, or save the model with "
                "more rows (resize_token_embeddings of transformers)."
            )
    return tokenizer


def _reads_bytes(folder: Path) -> bool:
    """Whether the folder's tokenizer is ByT5's, which has no vocabulary to keep in a file."""
    return any(
        '"ByT5Tokenizer"' in path.read_text(encoding="utf-8", errors="replace")
        for path in _settings(folder)
    )


def _settings(folder: Path) -> list[Path]:
    return [path for name in _TOKENIZER_SETTINGS if (path := folder / name).is_file()]


def pieces_without_a_row(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> list[str]:
    """Pieces that text or a recipe can ask for and whose ids the embedding table does not have.

    Some decoder-only models have special pieces for images beyond it, which nothing here asks for.
    """
    vocabulary, num_rows = tokenizer.get_vocab(), getattr(model_config, "vocab_size", None)
    beyond = [piece for piece, index in vocabulary.items() if num_rows and index >= num_rows]
    if beyond and not model_config.is_encoder_decoder:
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        unused = special_pieces(tokenizer).difference(named)
        beyond = [piece for piece in beyond if piece not in unused]
    return sorted(beyond, key=vocabulary.__getitem__)


def family_of(folder: Path) -> Family:
    """Whether the backbone in a folder reads input and target apart, or in one row.

    Raises:
        BackboneError: its config.json cannot be read.
    """
    return "seq2seq" if model_config_of(folder).is_encoder_decoder else "causal"


def load_backbone(
    config: BackboneConfig,
    ds_config: dict[str, Any] | None = None,
    accept: Accept = accept_any,
) -> Backbone:
    """All ranks: each reads its part of every tensor; then all prove together that none is missing.

    Args:
        config: which backbone, and how it is held.
        ds_config: engine plumbing, or None for ours.
        accept: is given the identity, on rank 0, before the weights are read; what it raises, all
            ranks raise.

    Raises:
        BackboneError: unreadable, incomplete or unsupported checkpoint.
        ConfigError: DeepSpeed does not know a setting of the ds_config.
        MachineError: transformers or DeepSpeed lacks what we build on; `shard_group: node` on nodes
            that cannot be told apart, or `offload: nvme` where nothing can be written.
    """
    ranks.together(lambda: assert_known("transformers"))
    if config.sharding == "zero3":
        start_deepspeed()
    ranks.together(lambda: assert_offload_possible(config))
    folder = locate_backbone(config)
    inventory = ranks.together(lambda: inventory_of(folder, config))
    ranks.on_main(lambda: accept(identity_of(inventory, config)))
    _warn_of_int8_held_otherwise(inventory, config)
    group = shard_group(config.shard_group) if config.sharding == "zero3" else None
    # No collective while reading: a rank that meets a damaged file leaves no other waiting.
    backbone = ranks.together(lambda: fill(inventory, config, ds_config, group))
    assert_all_arrived(backbone, inventory)
    inventory.reader.close()
    if config.sharding == "zero3":
        backbone.install_hooks()
    return backbone.train(config.dropout > 0)


def load_embedding(config: BackboneConfig) -> tuple[FrozenEmbedding, Identity]:
    """The embedding table alone, and whose it is; no other weight is read.

    Raises:
        BackboneError: unreadable, incomplete or unsupported checkpoint.
    """
    inventory = inventory_of(locate_backbone(config), config)
    return embedding_of(inventory, config), identity_of(inventory, config)


def inventory_of(folder: Path, config: BackboneConfig) -> Inventory:
    """The model without weights, and which stored tensor belongs where in it.

    Raises:
        BackboneError: unreadable, incomplete or unsupported checkpoint.
    """
    reader = CheckpointReader(folder)
    model_config = model_config_of(folder)
    for name in DROPOUT_NAMES:
        if hasattr(model_config, name):
            setattr(model_config, name, config.dropout)
    skeleton = _skeleton(folder, model_config)
    check_decoder_start(folder, model_config)
    return take_inventory(skeleton, reader, model_config)


def check_decoder_start(folder: Path, model_config: Any) -> None:
    """That an encoder-decoder's configuration says which token its decoder begins with.

    Raises:
        BackboneError: it does not, or the model has no such token.
    """
    if not model_config.is_encoder_decoder:
        return
    start = getattr(model_config, "decoder_start_token_id", None)
    if not isinstance(start, int) or not 0 <= start < model_config.vocab_size:
        raise BackboneError(
            f"{folder}/config.json needs decoder_start_token_id, a token below its vocab_size "
            f"{model_config.vocab_size} (found {start}). It is 0 for every public T5. Use the "
            "config.json that belongs to the weights."
        )


def _warn_of_int8_held_otherwise(inventory: Inventory, config: BackboneConfig) -> None:
    held_as_int8: set[str] = set()
    if config.quantization == "int8":
        held_as_int8 = inventory.skeleton.quantizable(config.quantized_layers)
    stored_as_int8 = {n for n, s in inventory.stored.items() if inventory.reader.is_quantized(s)}
    otherwise = sorted(stored_as_int8 - held_as_int8)
    if otherwise and ranks.is_main():
        log.warning(
            "%s stores %d matrices as int8 that this run does not hold as int8, such as %s: their "
            "values are those of int8 all the same. Set quantization=int8 with the quantized_layers"
            " of the copy, or backbone.path to the original checkpoint.",
            inventory.reader.folder,
            len(otherwise),
            otherwise[0],
        )


def _locate(config: BackboneConfig) -> Path:
    folder = Path(resolve_backbone(config.path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"Backbone folder {folder} has no config.json.")
        if config.revision:
            raise BackboneError(
                f"backbone.revision is {config.revision!r}, but {config.path} is a folder of this "
                "machine, which has no revisions. Set backbone.revision=null."
            )
        return folder
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise BackboneError(f"Backbone folder {config.path!r} does not exist. Set backbone.path.")
    return _from_hub(config)


def _from_hub(config: BackboneConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: tuple[str, ...]) -> Path:
        with phase(f"fetching {config.path} from the hub"):
            allowed = list(patterns)
            return Path(
                snapshot_download(config.path, revision=config.revision, allow_patterns=allowed)
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


def model_config_of(folder: Path) -> Any:
    """The Hugging Face configuration in a folder.

    Raises:
        BackboneError: it cannot be read, asks for code or names weights of its own, or the folder
            is an adapter of another model.
    """
    try:
        with open_regular(folder / "config.json") as file:
            raw = json.load(file)
        asks_for_code, weights = "auto_map" in raw, raw.get("transformers_weights")
        model_config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what transformers raises of a wrong value is of many kinds
        raise BackboneError(f"Cannot load backbone {folder}: {_of_config(error)}") from error
    if asks_for_code:
        raise BackboneError(
            f"{folder}/config.json asks for code of its own (auto_map), which is never run."
        )
    if weights:
        raise BackboneError(
            f"{folder}/config.json names its weights, {weights!r:.100} (transformers_weights), but "
            "only model.safetensors, pytorch_model.bin and their shards are read here. Give the "
            "file that name, and remove the key."
        )
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(
            f"{folder} holds adapter_config.json: to transformers it is an adapter (PEFT) of the "
            "model that this file names, whatever weights lie beside it. Name the folder of a "
            "whole model (merge_and_unload and save_pretrained make one), or remove the file."
        )
    return model_config


def _skeleton(folder: Path, model_config: Any) -> Skeleton:
    try:
        return build_skeleton(model_config)
    except SoftpromptError:
        raise
    except Exception as error:  # a size of 0 or below meets torch or Python itself
        raise BackboneError(f"Cannot build the model of {folder}: {_of_config(error)}") from error


def _of_config(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{reason.rstrip('.')}. Use the config.json that belongs to the weights."
