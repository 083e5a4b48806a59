"""Whether a published checkpoint of an adaptation is what its manifest says."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt_dist.durable import FileDigest, digest_of_file
from softprompt_dist.errors import CheckpointError
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import phase
from softprompt_dist.run.checkpoint_format import (
    ADAPTATION,
    MANIFEST,
    RANDOM_STATES,
    SMALL,
    STATE,
    InvalidCheckpointError,
    check_digest,
    check_step,
    malformed_is_invalid,
    read_manifest,
    read_verified,
)
from softprompt_dist.untrusted import parse_json

_COUNTERS = ("examples_consumed", "real_tokens", "seconds", "num_updates")


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says about itself, before its large files are read."""

    damage: str | None = None
    """Why it is not valid, if that can be seen already."""
    expected: dict[str, FileDigest] = field(default_factory=dict)
    """Of all files."""
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    world_size: int = 0


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read the manifest and the state, and look at the sizes of all files.

    Raises:
        CheckpointError: a later release wrote it, or a run of another kind.
        PermissionError: it may not be read.
    """
    try:
        return _inspect(folder)
    except InvalidCheckpointError as reason:
        return Inspection(damage=str(reason))


@malformed_is_invalid
def _inspect(folder: Path) -> Inspection:
    expected = read_manifest(folder, ADAPTATION)
    for name in (SMALL, RANDOM_STATES, STATE, *expected):
        size, right_size = (folder / name).stat().st_size, expected[name].num_bytes
        if size != right_size:
            raise InvalidCheckpointError(f"{name} has {size} bytes, not {right_size}")
    document = parse_json(read_verified(folder / STATE, expected[STATE]))
    check_step(folder, document["step"])
    expected[MANIFEST] = digest_of_file(folder / MANIFEST)
    return Inspection(None, expected, document["step"], document["state"], document["world_size"])


def check_all_see(folder: Path, expected: Mapping[str, FileDigest]) -> None:
    """All ranks: that what rank 0 has inspected is there for each of them.

    Raises:
        CheckpointError: on all ranks; some node has another folder of that name, or none.
    """
    places = ranks.gather_objects("" if sees_all(folder, expected) else platform.node())
    blind = [f"rank {rank} on {place}" for rank, place in enumerate(places) if place]
    if blind:
        error = CheckpointError(
            f"{folder} is there for rank 0, but not for {', '.join(blind[:5])}. Every node must "
            "see the checkpoints to resume: put --run-dir on a shared file system, or copy the "
            "folder to all nodes."
        )
        error.on_all_ranks = True
        raise error


def sees_all(folder: Path, expected: Mapping[str, FileDigest]) -> bool:
    """Whether this rank's node has the files, as far as their sizes and the manifest tell."""
    try:
        sizes = {name: (folder / name).stat().st_size for name in expected}
        return digest_of_file(folder / MANIFEST) == expected[MANIFEST] and all(
            sizes[name] == digest.num_bytes for name, digest in expected.items()
        )
    except FileNotFoundError:
        return False
    except OSError:
        return True  # reading it will say what is wrong


def damage_of(folder: Path, expected: Mapping[str, FileDigest]) -> str | None:
    """Read files whole, though not at once: what is wrong with them, if anything.

    Raises:
        PermissionError: one may not be read.
    """
    try:
        _check_digests(folder, expected)
    except InvalidCheckpointError as reason:
        return str(reason)
    return None


def verify(folder: Path) -> dict[str, FileDigest]:
    """The files of a checkpoint, each of which has been read and found to be as it must.

    Raises:
        InvalidCheckpointError: one is not.
    """
    expected = read_manifest(folder, ADAPTATION)
    _check_digests(folder, expected)
    return expected


@malformed_is_invalid
def _check_digests(folder: Path, expected: Mapping[str, FileDigest]) -> None:
    num_bytes = sum(digest.num_bytes for digest in expected.values())
    with phase("comparing checksums", num_bytes, "B") as told:
        for name, digest in expected.items():
            check_digest(folder / name, digest_of_file(folder / name, told.advance), digest)


def check_forms(
    state: Mapping[str, Any], saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """What can be wrong though every checksum is right: somebody else made the checkpoint.

    Raises:
        CheckpointError: a counter of `state`, or one of the small tensors, cannot be used.
    """
    wrong = [n for n, t in expected.items() if n not in saved or saved[n].shape != t.shape]
    wrong += [n for n in _COUNTERS if type(state.get(n)) not in (int, float)]
    if wrong:
        raise CheckpointError(
            f"The checkpoint is whole, but `softprompt adapt` did not write it: {', '.join(wrong)} "
            "cannot be used. Resume another one, or pass --fresh to set it aside."
        )
