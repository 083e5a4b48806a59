"""The bytes of a checkpoint folder, and the reading that trusts none of them before its sha256.

step-00000020/state.safetensors   tensors of the run, unsharded
              rng.safetensors     torch's generators, of every rank
              state.json          step, world size, the rest of the state
              manifest.json       format version, step, size and sha256 of the three
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from softprompt_dist.durable import FileDigest, digest_of, patiently
from softprompt_dist.errors import CheckpointError
from softprompt_dist.names import is_name
from softprompt_dist.run.random_state import joined_random_states
from softprompt_dist.untrusted import parse_json, read_bounded

P = ParamSpec("P")
T = TypeVar("T")

_MAX_DOCUMENT_BYTES = 1 << 26
_LIMIT = 2**63
_LONGEST_REASON = 300

FORMAT_VERSION = 1
TENSORS = "state.safetensors"
SMALL = "small.safetensors"
"""Of an adaptation, whose other tensors lie in weight files."""
RANDOM_STATES = "rng.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"

TUNING = "train"
ADAPTATION = "adapt"
"""Kinds of checkpoints, by the verb that saves them."""


@dataclass(frozen=True)
class CheckpointContent:
    """One verified folder; `random_states` holds those of all the ranks that saved it."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    world_size: int
    random_states: dict[str, Tensor]


class InvalidCheckpointError(Exception):
    """A checkpoint folder is damaged or incomplete; the text is the reason."""


def encode_checkpoint(
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    random_states: Sequence[Mapping[str, Tensor]],
) -> dict[str, bytes]:
    """Content of every file of the folder by name, the manifest last; one random state a rank."""
    files = {TENSORS: tensor_bytes(tensors)} | encode_rest(step, state, random_states)
    digests = {name: digest_of(content) for name, content in files.items()}
    return files | {MANIFEST: encode_manifest(step, digests)}


def encode_rest(
    step: int, state: Mapping[str, Any], random_states: Sequence[Mapping[str, Tensor]]
) -> dict[str, bytes]:
    """The files of a checkpoint besides its tensors and the manifest."""
    document = {"step": step, "world_size": len(random_states), "state": dict(state)}
    return {
        RANDOM_STATES: tensor_bytes(joined_random_states(random_states)),
        STATE: json.dumps(document, indent=1).encode(),
    }


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of small tensors."""
    # Cloned: safetensors refuses tensors that share memory or have gaps.
    dense = torch.contiguous_format
    copies = {k: t.detach().cpu().clone(memory_format=dense) for k, t in tensors.items()}
    return safetensors.torch.save(copies)


def encode_manifest(step: int, digests: Mapping[str, FileDigest], kind: str = TUNING) -> bytes:
    """Which files a checkpoint consists of, and how each is recognised."""
    files = {name: {"bytes": d.num_bytes, "sha256": d.sha256} for name, d in digests.items()}
    document = {"format_version": FORMAT_VERSION, "kind": kind, "step": step, "files": files}
    return json.dumps(document, indent=1).encode()


def malformed_is_invalid(
    read: Callable[Concatenate[Path, P], T],
) -> Callable[Concatenate[Path, P], T]:
    """Whatever goes wrong when `read` reads in a folder is InvalidCheckpointError, but a denial.

    A disk that is away for a moment is waited for: what it holds may be whole.
    """

    @wraps(read)
    def reading(folder: Path, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return patiently(lambda: read(folder, *args, **kwargs))
        except PermissionError:
            raise
        except OSError as error:
            raise InvalidCheckpointError(
                f"{Path(error.filename or folder).name}: {error.strerror}"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InvalidCheckpointError(
                f"it is malformed ({type(error).__name__}: {str(error)[:_LONGEST_REASON]})"
            ) from error
        except SafetensorError as error:
            raise InvalidCheckpointError(f"it is malformed ({error})") from error

    return reading


@malformed_is_invalid
def read_manifest(folder: Path, kind: str) -> dict[str, FileDigest]:
    """The files of a checkpoint, by name, as they must be.

    Raises:
        InvalidCheckpointError: the manifest is missing or malformed, or of another step.
        CheckpointError: a later release wrote it, or a run of another kind.
        PermissionError: it may not be read.
    """
    if folder.is_symlink():
        raise InvalidCheckpointError("it is a symbolic link, and its files may be another run's")
    manifest = parse_json(read_bounded(_own_file(folder, MANIFEST), _MAX_DOCUMENT_BYTES))
    if _whole(manifest["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest['format_version']}; this release reads "
            f"{FORMAT_VERSION}. Install the release that wrote it, or pass --fresh."
        )
    if manifest.get("kind", TUNING) != kind:
        raise CheckpointError(
            f"The checkpoint of step {manifest['step']!r:.40} belongs to another run: saved by "
            f"softprompt {manifest.get('kind', TUNING)!s:.40}, now {kind}. Use another --run-dir, "
            "or --fresh to set the old run aside."
        )
    check_step(folder, _whole(manifest["step"]))
    for name in manifest["files"]:
        _own_file(folder, name)
    files = manifest["files"].items()
    return {name: FileDigest(_whole(f["bytes"]), str(f["sha256"])) for name, f in files}


def check_step(folder: Path, step: int) -> None:
    """A checkpoint must not be taken for that of another step: InvalidCheckpointError."""
    if folder.name != f"step-{step:08d}":
        raise InvalidCheckpointError(f"it holds step-{step:08d}, which is not its name")


def read_verified(path: Path, expected: FileDigest) -> bytes:
    """A small file's content, once it is found to be what the manifest says."""
    try:
        content = read_bounded(_own_file(path.parent, path.name), expected.num_bytes)
    except ValueError:
        size = path.stat().st_size
        raise InvalidCheckpointError(
            f"{path.name} has {size} bytes, not {expected.num_bytes}"
        ) from None
    check_digest(path, digest_of(content), expected)
    return content


def check_digest(path: Path, found: FileDigest, expected: FileDigest) -> None:
    """Raise InvalidCheckpointError where a file is not what the manifest says."""
    if found.num_bytes != expected.num_bytes:
        raise InvalidCheckpointError(
            f"{path.name} has {found.num_bytes} bytes, not {expected.num_bytes}"
        )
    if found != expected:
        raise InvalidCheckpointError(f"the sha256 of {path.name} is not that of its manifest")


@malformed_is_invalid
def read_checkpoint(folder: Path) -> CheckpointContent:
    """Read a folder; every byte that is parsed has been compared with the manifest first.

    Raises:
        InvalidCheckpointError: it is damaged or incomplete.
        CheckpointError: a later release of this package wrote it.
        PermissionError: it may not be read, which says nothing about what it holds.
    """
    expected = read_manifest(folder, TUNING)
    files = {n: read_verified(folder / n, expected[n]) for n in (TENSORS, RANDOM_STATES, STATE)}
    document = parse_json(files[STATE])
    check_step(folder, _whole(document["step"]))
    tensors = safetensors.torch.load(files[TENSORS])
    _check_finite(tensors)
    return CheckpointContent(
        document["step"],
        tensors,
        {**document["state"]},
        _whole(document["world_size"]),
        safetensors.torch.load(files[RANDOM_STATES]),
    )


def _own_file(folder: Path, name: str) -> Path:
    """A file of the checkpoint, which lies in its folder and nowhere else."""
    path = folder / name
    if not is_name(name) or path.is_symlink():
        raise InvalidCheckpointError(f"{name!r:.80} is a link, or no name of a file in it")
    return path


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise ValueError(f"{value!r:.40} is no whole number from 0 on")
    return value


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidCheckpointError(f"{name} has values that are NaN or infinite")
