"""The prompt file: one safetensors file with the tensor `prompt` [P, D] in fp32 and its metadata.

The metadata is one JSON object under the header's key `softprompt`, so the same prompt with the
same metadata is the same bytes. What is read is checked first, its size before its content, and
nothing is ever unpickled. Keys that this release does not know are passed over, so that later ones
may add some; `format_version` rises only when a reader that did so would be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softprompt_dist.durable import replace_file
from softprompt_dist.errors import PromptFileError
from softprompt_dist.identity import Identity, check_same_backbone
from softprompt_dist.untrusted import open_regular, parse_json

TENSOR_KEY = "prompt"
METADATA_KEY = "softprompt"
FORMAT_VERSION = 2
"""1, of release 0.1.0, does not say so, and of the backbone's identity has no configuration."""
MAX_HEADER_BYTES = 1 << 20
MAX_VALUES = 1 << 28
"""P x D; 1 GiB. A file may say anything of its shape, and have a hole of that size."""
_LENGTH_BYTES = 8
_EXACT = 2**53
"""Below it every whole number is a float of its own."""
_BETWEEN_TASKS = " + "


@dataclasses.dataclass(frozen=True)
class PromptMetadata:
    """What a prompt belongs to and how it came about."""

    identity: Identity
    """Of the backbone."""
    task: str
    initialisation: str
    step: int
    """Number of updates."""
    metric: str
    score: float
    """Value of `metric` on the validation split."""
    prompt_length: int
    """P."""
    d_model: int
    """D."""
    version: str
    """Of this package."""
    task_family: str = ""
    """What kind of answers it gives; tasks of one family share it. Several: see `families`."""
    target_prefix: str = ""
    """The piece that its answers begin with; empty for none. Several: see `target_prefixes`."""
    format_version: int = FORMAT_VERSION

    @property
    def families(self) -> tuple[str, ...]:
        """Each of `task_family`, which `joined` made."""
        return tuple(self.task_family.split(_BETWEEN_TASKS))

    @property
    def target_prefixes(self) -> tuple[str | None, ...]:
        """Each of `target_prefix`, which `joined` made; None for a task without one."""
        return tuple(prefix or None for prefix in self.target_prefix.split(_BETWEEN_TASKS))


def joined(facts: Iterable[str]) -> str:
    """What is true of a mixture's tasks as one text, each fact once."""
    return _BETWEEN_TASKS.join(dict.fromkeys(facts))


def save_prompt(path: str | Path, prompt_PD: Tensor, metadata: PromptMetadata) -> None:
    """Write a prompt file; a reader sees the earlier file or this one, whole.

    Raises:
        PromptFileError: the prompt is not a finite fp32 tensor of the metadata's shape, or the file
            cannot be written.
    """
    path = Path(path)
    _check_tensor(path, prompt_PD, metadata)
    header = {METADATA_KEY: json.dumps(dataclasses.asdict(metadata), sort_keys=True)}
    content = save({TENSOR_KEY: prompt_PD.detach().cpu().contiguous()}, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise PromptFileError(
            f"Cannot write prompt file {path}: {error.strerror or error}. Free some space, or "
            "choose a folder that can be written to."
        ) from error


def load_prompt(
    path: str | Path, *, backbone: Identity | None = None, force: bool = False
) -> tuple[Tensor, PromptMetadata]:
    """Read a prompt file.

    Args:
        path: the file.
        backbone: the one it must have been tuned for; None: any.
        force: take a prompt of another backbone all the same, with a warning.

    Returns:
        prompt_PD in fp32 on the CPU, and its metadata.

    Raises:
        PromptFileError: missing, not such a file, of a later format, truncated, not finite, or of
            another backbone.
    """
    path = Path(path)
    _check_header_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _checked_header(path, file)
            prompt_PD = file.get_tensor(TENSOR_KEY).clone()
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PromptFileError(
            f"{path} is not a whole safetensors file: {error}. Copy it again, or use another."
        ) from error
    _check_tensor(path, prompt_PD, metadata)
    if backbone is not None:
        belongs = f"{path} was tuned for"
        there, refusal = metadata.identity, PromptFileError
        check_same_backbone(there, backbone, belongs, error=refusal, force=force)
    return prompt_PD, metadata


def _checked_header(path: Path, file: Any) -> PromptMetadata:
    """The metadata of an open file, whose tensor is as they say; nothing of it is read yet."""
    keys = list(file.keys())
    if keys != [TENSOR_KEY]:
        raise PromptFileError(
            f"{path} holds the tensors {sorted(keys)[:5]!r:.300}, but a prompt file holds "
            f"{TENSOR_KEY!r} alone. Use a file that `softprompt train` wrote."
        )
    metadata = _read_metadata(path, file.metadata() or {})
    stored = file.get_slice(TENSOR_KEY)
    _check_form(path, stored.get_dtype(), tuple(stored.get_shape()), metadata)
    return metadata


def _check_header_length(path: Path) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    except OSError as error:
        raise PromptFileError(
            f"Cannot read prompt file {path}: {error.strerror or error}. Name a file that "
            "`softprompt train` wrote."
        ) from error
    if size > _LENGTH_BYTES + MAX_HEADER_BYTES + 4 * MAX_VALUES:
        raise PromptFileError(
            f"{path} has {size:,} bytes, and a prompt file up to {MAX_VALUES:,} values of 4 bytes. "
            "Use a file that `softprompt train` wrote."
        )
    if header_bytes > MAX_HEADER_BYTES or size < _LENGTH_BYTES + header_bytes:
        raise PromptFileError(
            f"{path} ({size} bytes) is not a prompt file, or only a part of one. Prompt files are "
            "safetensors; pickled ones (.pt, .bin, .pkl) are never read. Copy it again, or use one "
            "that `softprompt train` wrote."
        )


def _read_metadata(path: Path, header: dict[str, str]) -> PromptMetadata:
    try:
        values = parse_json(header[METADATA_KEY])
        if not isinstance(values, dict):
            raise TypeError(f"it is no object but a {type(values).__name__}")
        values = _of_this_format(path, values)
        fields = dataclasses.fields(PromptMetadata)
        return PromptMetadata(**{field.name: _typed(values, field) for field in fields})
    except (KeyError, TypeError, ValueError) as error:
        raise PromptFileError(
            f"{path} is a safetensors file without the metadata of a prompt file that this release "
            f"knows ({error!r:.500}). Use a file that `softprompt train` wrote."
        ) from error


def _of_this_format(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The metadata with the keys that `PromptMetadata` has."""
    version = values.get("format_version", 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {version!r:.80}, not a whole number from 1 on")
    if version > FORMAT_VERSION:
        raise PromptFileError(
            f"{path} is a prompt file of format version {version}, and this release reads "
            f"versions 1 to {FORMAT_VERSION}. Install the release of softprompt-dist that wrote it "
            f"({values.get('version')!r:.80}), or a later one."
        )
    values = values | {"format_version": FORMAT_VERSION}
    if version > 1:
        return values | {"identity": Identity.from_json(values["identity"])}
    names = ("backbone", "backbone_fingerprint", "tokenizer_fingerprint")
    if wrong := [name for name in names if type(values[name]) is not str]:
        raise TypeError(f"{wrong[0]} is {values[wrong[0]]!r:.80}, not a str")
    path_there, weights, vocabulary = (values[name] for name in names)
    tokenizer = {"vocabulary": vocabulary} if vocabulary else {}
    return values | {"identity": Identity(path_there, weights, tokenizer=tokenizer)}


def _typed(values: dict[str, Any], field: dataclasses.Field[Any]) -> Any:
    if field.name not in values and field.default is not dataclasses.MISSING:
        return field.default
    value = values[field.name]
    # Annotations are strings here. A whole number is a float too; a bool is no number.
    if field.type == "float" and type(value) is int and abs(value) < _EXACT:
        return float(value)
    if type(value).__name__ != field.type:
        raise TypeError(f"{field.name} is {value!r:.80}, not a {field.type}")
    if field.type == "int" and not 0 <= value < _EXACT:
        raise ValueError(f"{field.name} is not between 0 and 2 ** 53")
    if field.type == "float" and not math.isfinite(value):
        raise ValueError(f"{field.name} is {value}")
    return value


def _check_form(path: Path, dtype: str, shape: tuple[int, ...], metadata: PromptMetadata) -> None:
    expected = (metadata.prompt_length, metadata.d_model)
    if dtype != "F32" or shape != expected or not 0 < math.prod(shape) <= MAX_VALUES:
        raise PromptFileError(
            f"{path}: the prompt is {shape!r:.100} in {dtype}, but must be {expected}, as its "
            f"metadata says, of up to {MAX_VALUES:,} values in float32 (F32). Use a file that "
            "`softprompt train` wrote."
        )


def _check_tensor(path: Path, prompt_PD: Tensor, metadata: PromptMetadata) -> None:
    dtype = "F32" if prompt_PD.dtype == torch.float32 else str(prompt_PD.dtype)
    _check_form(path, dtype, tuple(prompt_PD.shape), metadata)
    num_bad = int((~torch.isfinite(prompt_PD)).sum())
    if num_bad:
        raise PromptFileError(
            f"{path}: {num_bad} values of the prompt are NaN or infinite, and all must be numbers. "
            "Use another prompt."
        )
