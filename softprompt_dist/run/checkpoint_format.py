"""The bytes of a checkpoint folder, and the reading that trusts none of them before its sha256.

step-00000020/state.safetensors   tensors of the run, unsharded
              rng.safetensors     torch's generators, of every rank
              state.json          step, world size, the rest of the state
              manifest.json       format version, step, size and sha256 of the three
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from softprompt_dist.errors import CheckpointError

FORMAT_VERSION = 1
TENSORS = "state.safetensors"
RANDOM_STATES = "rng.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CheckpointContent:
    """One verified folder; `random_states` holds those of all the ranks that saved it."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    world_size: int
    random_states: dict[str, Tensor]

    def random_state_of(self, rank: int) -> dict[str, Tensor]:
        """Generator states of `rank` at the save, by kind of device."""
        prefix = f"rank{rank}."
        states = self.random_states.items()
        return {key.removeprefix(prefix): t for key, t in states if key.startswith(prefix)}


class InvalidCheckpointError(Exception):
    """A checkpoint folder is damaged or incomplete; the text is the reason."""


def encode_checkpoint(
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    random_states: Sequence[Mapping[str, Tensor]],
) -> dict[str, bytes]:
    """Content of every file of the folder by name, the manifest last; one random state a rank."""
    by_rank = {f"rank{r}.{k}": t for r, s in enumerate(random_states) for k, t in s.items()}
    document = {"step": step, "world_size": len(random_states), "state": dict(state)}
    files = {
        TENSORS: _to_bytes(tensors),
        RANDOM_STATES: _to_bytes(by_rank),
        STATE: json.dumps(document, indent=1).encode(),
    }
    return files | {MANIFEST: _manifest(step, files)}


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # Cloned: safetensors refuses tensors that share memory or have gaps.
    dense = torch.contiguous_format
    copies = {k: t.detach().cpu().clone(memory_format=dense) for k, t in tensors.items()}
    return safetensors.torch.save(copies)


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    document = {"format_version": FORMAT_VERSION, "step": step, "files": entries}
    return json.dumps(document, indent=1).encode()


def read_checkpoint(folder: Path) -> CheckpointContent:
    """Read a folder; every byte that is parsed has been compared with the manifest first.

    Raises:
        InvalidCheckpointError: it is damaged or incomplete.
        CheckpointError: a later release of this package wrote it.
        PermissionError: it may not be read, which says nothing about what it holds.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has checkpoint format {manifest['format_version']}; this release reads "
                f"{FORMAT_VERSION}. Install the release that wrote it, or pass --fresh."
            )
        files = {n: _read_verified(folder / n, manifest) for n in (TENSORS, RANDOM_STATES, STATE)}
        document = json.loads(files[STATE])
        steps = {f"step-{s:08d}" for s in (manifest["step"], document["step"])}
        if steps != {folder.name}:
            raise InvalidCheckpointError(
                f"it holds {', '.join(sorted(steps))}, which is not its name"
            )
        tensors, by_rank = (
            safetensors.torch.load(files[name]) for name in (TENSORS, RANDOM_STATES)
        )
        world_size, state = document["world_size"], document["state"]
    except PermissionError:
        raise
    except OSError as error:
        raise InvalidCheckpointError(
            f"{Path(error.filename or folder).name}: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InvalidCheckpointError(
            f"it is malformed ({type(error).__name__}: {error})"
        ) from error
    return CheckpointContent(manifest["step"], tensors, state, world_size, by_rank)


def _read_verified(path: Path, manifest: Any) -> bytes:
    entry = manifest["files"][path.name]
    content = path.read_bytes()
    if len(content) != entry["bytes"]:
        raise InvalidCheckpointError(f"{path.name} has {len(content)} bytes, not {entry['bytes']}")
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise InvalidCheckpointError(f"the sha256 of {path.name} is not that of its manifest")
    return content
