"""A Hugging Face folder of the weights as they are: any transformers from 4.x on reads it."""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from softprompt_dist.adaptation.model_card import EXPORTED, model_card
from softprompt_dist.adaptation.sharded_files import WeightFormat, num_bytes_of, write_tensors
from softprompt_dist.adaptation.sharded_tensor import ShardedTensor
from softprompt_dist.adaptation.source import HISTORY, identity_in
from softprompt_dist.backbone.t5_v11 import DROPOUT_RATE
from softprompt_dist.durable import explained, flush_files, free_bytes, new_folder
from softprompt_dist.errors import ConfigError, MachineError
from softprompt_dist.parallel import ranks

log = logging.getLogger(__name__)

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_HEAD = "lm_head.weight"
_T5_CLASSES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
_OF_LOADING = {"dtype", "_name_or_path", "transformers_version", "quantization_config"}
"""Keys of a config.json that say how it was loaded, not what it is."""


@dataclass(frozen=True)
class ExportedModel:
    """What lies beside the weights."""

    name: str
    hf_config: PretrainedConfig
    """The source's, with the dropout that it came with."""
    tokenizer: PreTrainedTokenizerBase
    source: Path | None
    """Folder of the checkpoint that was started from; None: the model was made from nothing."""
    stages: Sequence[Mapping[str, Any]]
    """All that it went through, as `Stage.to_json` gives them; the last has made it."""


def check_export_folder(folder: Path, identity: str, steps: int, dtype: torch.dtype) -> None:
    """All ranks: that an export can go there, before anything is computed for it.

    Raises:
        ConfigError: something is there, other than the same export of an earlier attempt.
    """
    ranks.on_main(lambda: _is_there(folder, identity, steps, dtype))


def export_folder(  # noqa: PLR0913 - what, where, how, and two that most leave out
    folder: Path,
    tensors: Mapping[str, ShardedTensor],
    model: ExportedModel,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """All ranks: write weights, config, tokenizer, history and model card; all of it, or nothing.

    The same export of an earlier attempt is left as it is. The head and the embedding of a model
    that ties them are one tensor of `tensors`. `between` is called on all ranks now and then: what
    it raises there leaves nothing behind.

    Raises:
        ConfigError: on all ranks; something else is there.
        MachineError: on all ranks; it cannot be written.
    """
    last = model.stages[-1]
    if ranks.on_main(lambda: _is_there(folder, last["identity"], last["steps"], dtype)):
        log.info("%s is exported already.", folder)
        return
    needed = num_bytes_of(tensors, dtype)

    def refusal(error: OSError) -> MachineError:
        return MachineError(
            f"Cannot export to {folder}: {error.strerror or error}. It takes {needed:,} bytes and "
            f"some more, {free_bytes(folder.parent)} are free there; nothing is left of it. Free "
            "some space or permit it, then export again with --export FOLDER."
        )

    with _new_folder(folder, refusal) as temporary:
        factors = _factors(model.hf_config)
        weights = WeightFormat(dtype, max_shard_bytes=max_shard_bytes, factors=factors)
        write_tensors(temporary, tensors, weights, error=refusal, between=between)
        num_parameters = sum(tensor.numel for tensor in tensors.values())
        ranks.on_main(
            explained(lambda: _write_rest(temporary, model, dtype, num_parameters), refusal)
        )


def exported_config(
    hf_config: PretrainedConfig, source: Path | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of an export.

    A decoder-only model keeps its source's. A T5 v1.1 says that its head is its own: transformers 4
    takes the source's own word for it, 5 compares the tensors. Nor is the head's input scaled, for
    `_factors` takes the scale into the head. Dropout is what the source had; of a source that had
    none, what public T5 v1.1 have, for those who fine-tune.
    """
    if source is not None:
        config = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    else:
        config = json.loads(hf_config.to_json_string(use_diff=True))
    config = {key: value for key, value in config.items() if key not in _OF_LOADING}
    # Both major versions of transformers know this name of it.
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if hf_config.model_type in _T5_CLASSES:
        config["architectures"] = [_T5_CLASSES[hf_config.model_type]]
        config["tie_word_embeddings"] = False
        config["scale_decoder_outputs"] = False
        config["dropout_rate"] = config.get("dropout_rate") or DROPOUT_RATE
    return config


def _factors(hf_config: PretrainedConfig) -> dict[str, float]:
    if hf_config.model_type == "t5" and getattr(hf_config, "scale_decoder_outputs", False):
        return {_HEAD: hf_config.d_model**-0.5}
    return {}


def _is_there(folder: Path, identity: str, steps: int, dtype: torch.dtype) -> bool:
    """Whether this very export is there already."""
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        last = json.loads((folder / HISTORY).read_text(encoding="utf-8"))[-1]
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        found = last["identity"], last["steps"], config["torch_dtype"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None, None, None
    if found != (identity, steps, str(dtype).removeprefix("torch.")):
        raise ConfigError(
            f"The export folder {folder} is not empty, and nothing is ever overwritten. Remove or "
            "rename it, or let the run have another --run-dir or the export another --export."
        )
    return True


@contextmanager
def _new_folder(folder: Path, refusal: Any) -> Iterator[Path]:
    """All ranks: rank 0's `durable.new_folder`."""
    opened = ExitStack()
    temporary = ranks.on_main(explained(lambda: opened.enter_context(new_folder(folder)), refusal))
    try:
        yield temporary
    except BaseException:
        opened.__exit__(*sys.exc_info())
        raise
    ranks.on_main(explained(opened.close, refusal))


def _write_rest(
    folder: Path, model: ExportedModel, dtype: torch.dtype, num_parameters: int
) -> None:
    config = exported_config(model.hf_config, model.source, dtype)
    (folder / _CONFIG).write_bytes(_json(config))
    if model.source is not None and (model.source / _GENERATION_CONFIG).is_file():
        content = (model.source / _GENERATION_CONFIG).read_bytes()
        (folder / _GENERATION_CONFIG).write_bytes(content)
    _write_tokenizer(folder, model.tokenizer)
    identity = replace(identity_in(folder, model.tokenizer), path=model.name)
    *earlier, last = model.stages
    stages = [*earlier, {**last, EXPORTED: asdict(identity)}]
    card = model_card(model.name, num_parameters, model.hf_config.model_type, stages)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / HISTORY).write_bytes(_json(stages))
    flush_files(folder)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # the tokenizers library says no more of a full disk than this
        raise OSError(errno.EIO, str(error)) from error
    path = folder / _TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_bytes(_json(_for_any_version(settings)))


def _for_any_version(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tokenizer as transformers 4 reads them, too; without how it was loaded."""
    settings = {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # 4 expects names for them under this key
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") in ("T5Tokenizer", "LlamaTokenizer"):
        # Lets 4 ask for the sentencepiece model that 5 does not save; tokenizer.json says it, too.
        settings.pop("add_prefix_space", None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
