"""What an adaptation starts from: a checkpoint of any size, or a new small T5 v1.1."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import check_start
from softprompt_dist.adaptation.fragments import Layout
from softprompt_dist.adaptation.model_card import EXPORTED, SAID_OF_STAGES
from softprompt_dist.adaptation.sharded_files import read_into
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.filling import identity_of
from softprompt_dist.backbone.fingerprint import fingerprint
from softprompt_dist.backbone.inventory import take_inventory
from softprompt_dist.backbone.load import (
    DROPOUT_NAMES,
    check_decoder_start,
    inventory_of,
    load_tokenizer,
    locate_backbone,
    model_config_of,
    pieces_without_a_row,
)
from softprompt_dist.backbone.skeleton import build_skeleton
from softprompt_dist.backbone.t5_v11 import draw_weights, t5_config
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.errors import BackboneError, ConfigError
from softprompt_dist.identity import Identity, check_same_backbone, config_that_counts
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import phase

HISTORY = "adaptation.json"
"""In an exported folder: the stages that it went through."""
_HEAD = "lm_head.weight"
_EMBEDDING_ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class Source:
    """Configuration and tokenizer are here; weights are read when there is a place for them."""

    hf_config: PretrainedConfig
    """As the source has it."""
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None
    """Of the checkpoint; None: the model is made from nothing."""
    seed: int

    history: tuple[dict[str, Any], ...] = ()
    """The stages that the checkpoint went through, where it says so."""

    def identity(self) -> Identity:
        """Of what is started from, samples of whose weights are read; no collective.

        A model that is made from nothing has no weights yet.
        """
        if self.folder is None:
            config = config_that_counts(self.hf_config)
            return Identity("a new model", "", config, tokenizer_identity(self.tokenizer))
        return identity_in(self.folder, self.tokenizer)

    def lineage(self) -> list[str]:
        """A line of each stage of `history`, by which two are told apart."""
        return [
            f"{stage['name']}, {stage['steps']} steps, {stage.get('identity', '')!s:.12}"
            for stage in self.history
        ]

    def training_config(self, dropout: float) -> PretrainedConfig:
        """The configuration with the dropout that is trained with."""
        changed = copy.deepcopy(self.hf_config)
        for name in DROPOUT_NAMES:
            if isinstance(getattr(changed, name, None), int | float):
                setattr(changed, name, dropout)
        return changed

    def fill(self, layout: Layout) -> None:
        """All ranks: put the weights where `layout` has room for them.

        Raises:
            BackboneError: on all ranks; the checkpoint is damaged, incomplete or of another shape.
        """
        if self.folder is None:
            with phase("making the weights"):
                _draw_into(layout, self.hf_config, self.seed)
            return
        folder = self.folder
        names = ranks.together(lambda: _stored_names(folder, layout, self.hf_config))
        read_into(folder, layout.weights(), names)


def find_source(config: AdaptConfig) -> Source:
    """All ranks: what a recipe starts from; rank 0 fetches it where needed.

    Raises:
        ConfigError: the recipe leaves out what its `init` needs, or its objective does not suit
            the model.
        BackboneError: no such checkpoint, no usable tokenizer, or a model that is not T5 v1.1 or
            decoder-only, or that does not say what its decoder begins with.
        DataError: a tokenizer without padding or end of sequence.
    """
    folder = _folder(config)
    return ranks.together(lambda: source_in(folder, config))


def source_in(folder: Path | None, config: AdaptConfig) -> Source:
    """What `find_source` finds, once the checkpoint's files are here; no collective.

    Raises:
        ConfigError, BackboneError, DataError: as `find_source`.
    """
    tokenizer_folder = Path(config.tokenizer) if config.tokenizer else folder
    assert tokenizer_folder is not None
    tokenizer = load_tokenizer(tokenizer_folder)
    if folder is None:
        rows = -(-len(tokenizer) // _EMBEDDING_ROWS_MULTIPLE) * _EMBEDDING_ROWS_MULTIPLE
        special = SpecialIds.of(tokenizer, config.objective)
        hf_config = t5_config(config.architecture, rows, special.pad, special.eos)
    else:
        hf_config = _checked_config(folder)
    source = Source(hf_config, tokenizer, folder, config.seed, _history(folder))
    _check_fits(config, source)
    return source


def identity_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Identity:
    """Of a model's folder and the tokenizer that goes with it; no collective.

    The weights of a decoder-only model that is no backbone are known by their stored names.

    Raises:
        BackboneError: the checkpoint cannot be read, or is not a whole T5.
    """
    settings = BackboneConfig(path=str(folder))
    try:
        inventory = inventory_of(folder, settings)
        reader, identity = inventory.reader, identity_of(inventory, settings)
    except BackboneError:
        hf_config = model_config_of(folder)
        if hf_config.is_encoder_decoder:
            raise
        reader = CheckpointReader(folder)
        weights = fingerprint(reader, {name: name for name in reader.shapes})
        identity = Identity(str(folder), weights, config_that_counts(hf_config))
    reader.close()
    return dataclasses.replace(identity, tokenizer=tokenizer_identity(tokenizer), dtype="")


def check_history(source: Source, here: Identity, config: AdaptConfig, *, force: bool) -> None:
    """Refuse a history that tells of another model than the one beside it; no collective.

    Raises:
        BackboneError: weights, config or tokenizer were replaced since the export, and not `force`.
    """
    exported = source.history[-1].get(EXPORTED) if source.history else None
    if exported is None:  # no history, or of an earlier release
        return
    assert source.folder is not None
    path = source.folder / HISTORY
    try:
        there = Identity.from_json(exported)
    except ValueError as error:
        raise BackboneError(f"{path}: {error}. Fetch it again, or remove it.") from error
    if config.tokenizer:  # not the one beside it
        here = dataclasses.replace(here, tokenizer={})
    belongs = f"{path} tells what made"
    check_same_backbone(there, here, belongs, error=BackboneError, force=force)


def _folder(config: AdaptConfig) -> Path | None:
    check_start(config)
    if config.init == "from_config":
        return None
    assert config.backbone is not None
    return locate_backbone(BackboneConfig(path=config.backbone))


def _history(folder: Path | None) -> tuple[dict[str, Any], ...]:
    path = folder / HISTORY if folder else None
    if path is None or not path.is_file():
        return ()
    try:
        stages = tuple(json.loads(path.read_text(encoding="utf-8")))
        missing = sorted(name for stage in stages for name in SAID_OF_STAGES if name not in stage)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        missing, stages = [str(error)], ()
    if missing:
        raise BackboneError(
            f"{path} does not tell what made the backbone ({', '.join(missing)}). Fetch it "
            "again, or remove it."
        )
    return stages


def _checked_config(folder: Path) -> PretrainedConfig:
    hf_config = model_config_of(folder)
    check_decoder_start(folder, hf_config)
    if not hf_config.is_encoder_decoder:
        if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BackboneError(
                f"{folder} holds a model of type {hf_config.model_type}, which writes no text. "
                "Set `backbone` to a T5 v1.1, LM-adapted or decoder-only checkpoint."
            )
        return hf_config
    reader = CheckpointReader(folder)
    has_own_head = _HEAD in reader.shapes
    reader.close()
    if hf_config.model_type not in ("t5", "mt5") or not hf_config.is_gated_act or not has_own_head:
        raise BackboneError(
            f"{folder} is not a whole T5 v1.1 (gated feed-forward, a head of its own; found type "
            f"{hf_config.model_type}, activation {getattr(hf_config, 'feed_forward_proj', '?')}, "
            f"{'a' if has_own_head else 'no'} head). Set `backbone` to a T5 v1.1, LM-adapted or "
            "decoder-only checkpoint."
        )
    return hf_config


def _check_fits(config: AdaptConfig, source: Source) -> None:
    is_lm, is_seq2seq = config.objective == "lm", source.hf_config.is_encoder_decoder
    if is_lm == is_seq2seq:
        kind = "an encoder-decoder" if is_seq2seq else "decoder-only"
        fitting = "prefix_lm or span_corruption" if is_seq2seq else "lm"
        raise ConfigError(
            f"objective is {config.objective}, but {config.backbone or 'the model'} is {kind}. "
            f"Set objective to {fitting}, or another backbone."
        )
    if beyond := pieces_without_a_row(source.tokenizer, source.hf_config):
        raise ConfigError(
            f"The tokenizer has {len(beyond)} pieces, such as {beyond[0]!r}, beyond the "
            f"{source.hf_config.vocab_size} rows of the model's embedding. Set `tokenizer` to the "
            "one that belongs to the model."
        )


def _stored_names(folder: Path, layout: Layout, hf_config: PretrainedConfig) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, where it is another."""
    reader = CheckpointReader(folder)
    try:
        if hf_config.is_encoder_decoder:
            return take_inventory(build_skeleton(hf_config), reader, hf_config).stored
        _check_head(reader, hf_config)
        names = {fragment.name for _, fragment in layout.fragments()} - reader.shapes.keys()
        bare = {name: name.split(".", 1)[-1] for name in names}
        return {name: stored for name, stored in bare.items() if stored in reader.shapes}
    finally:
        reader.close()


def _check_head(reader: CheckpointReader, hf_config: PretrainedConfig) -> None:
    """That a head which the config calls the embedding table is stored as that, or not at all."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head, table = names[id(model.get_output_embeddings())], names[id(model.get_input_embeddings())]
    table = table if table in reader.shapes else table.split(".", 1)[-1]
    both_stored = {head, table} <= reader.shapes.keys()
    if hf_config.tie_word_embeddings and both_stored and not reader.are_equal(head, table):
        raise BackboneError(
            f"{reader.folder} holds a head, {head}, that is not its embedding table, {table}, "
            "but its config.json says that one serves as both. Set tie_word_embeddings to false "
            "there."
        )


@torch.no_grad()
def _draw_into(layout: Layout, hf_config: PretrainedConfig, seed: int) -> None:
    for name, tensor in layout.weights().items():
        for piece in tensor.pieces:
            part, filled = range(piece.first, piece.first + len(piece.values)), 0
            for values in draw_weights(hf_config, seed, name, tensor.numel, part):
                piece.values[filled : filled + len(values)] = values
                filled += len(values)
