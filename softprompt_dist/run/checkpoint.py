"""Checkpoints that are there whole or not at all, and are trusted only after their sha256.

Rank 0 alone touches the disk; what it has read and verified is broadcast. So no rank can see
another file, nor resume from another step, and the folder need not be visible to the other nodes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt_dist.durable import flush_folder, write_file
from softprompt_dist.errors import CheckpointError
from softprompt_dist.parallel import ranks
from softprompt_dist.run.checkpoint_format import (
    MANIFEST,
    TENSORS,
    CheckpointContent,
    InvalidCheckpointError,
    encode_checkpoint,
    read_checkpoint,
)
from softprompt_dist.run.random_state import (
    derived_random_state,
    random_state,
    restore_random_state,
)

log = logging.getLogger(__name__)

_PUBLISHED = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-step-"
_CORRUPT = "corrupt-"
_DISCARDED = "discarded-"


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from; the same on every rank but for `rng`, which is this rank's."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    rng: dict[str, Tensor]

    def restore_rng(self) -> None:
        """Set this rank's torch generators to where they were at the save."""
        restore_random_state(self.rng)


class CheckpointStore:
    """The checkpoints of one run in `folder`, of which the last `keep_last` are kept."""

    def __init__(self, folder: str | Path, keep_last: int) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept.")
        self.folder = Path(folder)
        self.keep_last = keep_last

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Publish a checkpoint of `step`; all ranks, with equal `tensors` and JSON-able `state`.

        Every rank's torch generators are saved beside them. A step that is published already, with
        the same tensors, is left as it is.

        Raises:
            CheckpointError: on all ranks, when it cannot be written; earlier ones are intact.
        """
        # Here and not only on rank 0: a value JSON does not know must stop every rank.
        json.dumps(dict(state))
        random_states = ranks.gather_objects(random_state())
        ranks.on_main(lambda: self._save(step, tensors, state, random_states))

    def load_newest(self) -> Checkpoint | None:
        """The valid checkpoint of the highest step, or None where none was ever saved; all ranks.

        Damaged ones met on the way are renamed to `corrupt-step-...` with a warning. On another
        number of ranks than at the save, `rng` is derived from `state["seed"]`, step and rank.

        Raises:
            CheckpointError: checkpoints are there, but none is valid: never start over unasked.
        """
        content = ranks.on_main(self._read_newest)
        if content is None:
            return None
        rng = _random_state_of_this_rank(content)
        return Checkpoint(content.step, content.tensors, content.state, rng)

    def discard_all(self) -> None:
        """Rename all checkpoints, damaged ones too, so that the run starts at step 0; all ranks.

        Raises:
            CheckpointError: the folder may not be changed.
        """
        ranks.on_main(self._discard_all)

    def _save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        random_states: list[dict[str, Tensor]],
    ) -> None:
        final = self.folder / f"step-{step:08d}"
        files = encode_checkpoint(step, tensors, state, random_states)
        try:
            if self._is_published(final, files[TENSORS]):
                return
            self._publish(final, files)
        except OSError as error:
            raise _not_written(final, error, sum(map(len, files.values()))) from error
        self._remove_older(step)

    def _is_published(self, final: Path, tensor_bytes: bytes) -> bool:
        if not final.exists():
            return False
        try:
            read_checkpoint(final)
        except InvalidCheckpointError as reason:
            _set_aside(final, _CORRUPT, str(reason))
            return False
        if (final / TENSORS).read_bytes() != tensor_bytes:
            raise CheckpointError(
                f"{final} is published already, with other tensors, and is never "
                "overwritten. Is another run writing here? Use another --run-dir, or --fresh."
            )
        log.info("%s is published already.", final)
        return True

    def _publish(self, final: Path, files: Mapping[str, bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        flush_folder(self.folder.parent)
        temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            for name, content in files.items():
                write_file(temporary / name, content)
            flush_folder(temporary)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        flush_folder(self.folder)
        try:
            read_checkpoint(final)
        except InvalidCheckpointError as reason:
            aside = _set_aside(final, _CORRUPT, str(reason))
            raise CheckpointError(
                f"{final} does not read back as written: {reason}. It is kept as {aside.name}; "
                "earlier checkpoints are intact. Check the disk, then resume."
            ) from reason

    def _remove_older(self, step: int) -> None:
        older = [path for s, path in self._published() if s < step]
        for path in older[: max(0, len(older) - (self.keep_last - 1))]:
            try:
                # Without its manifest a half-deleted folder counts as damaged, not as a checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
            except OSError as error:
                log.warning("The old checkpoint %s could not be removed: %s", path, error)

    def _read_newest(self) -> CheckpointContent | None:
        try:
            if not self.folder.exists():
                return None
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):
                log.warning("Removing %s, left by a save that was interrupted.", leftover)
                shutil.rmtree(leftover, ignore_errors=True)
            for _, path in reversed(self._published()):
                try:
                    return read_checkpoint(path)
                except InvalidCheckpointError as reason:
                    _set_aside(path, _CORRUPT, str(reason))
            damaged = sorted(self.folder.glob(f"{_CORRUPT}step-*"))
        except OSError as error:
            raise CheckpointError(
                f"Cannot look for checkpoints in {self.folder}: {error}. The folder must be "
                "readable and writable; correct its permissions, or pass another --run-dir."
            ) from error
        if damaged:
            raise CheckpointError(
                f"{self.folder} holds {len(damaged)} damaged checkpoint(s) and no valid one, so "
                "the run cannot be resumed. Restore one from a backup, or start over with --fresh."
            )
        return None

    def _discard_all(self) -> None:
        try:
            damaged = sorted(self.folder.glob(f"{_CORRUPT}step-*"))
            for path in [*(p for _, p in self._published()), *damaged]:
                _set_aside(path, _DISCARDED, "a fresh start was asked for")
        except OSError as error:
            raise CheckpointError(
                f"Cannot discard the checkpoints in {self.folder}: {error}. Correct the folder's "
                "permissions, or pass another --run-dir."
            ) from error

    def _published(self) -> list[tuple[int, Path]]:
        """Folders that bear a checkpoint's name, valid or not, by rising step."""
        if not self.folder.exists():
            return []
        named = [(_PUBLISHED.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in named if match)


def _set_aside(path: Path, prefix: str, reason: str) -> Path:
    name = prefix + path.name.removeprefix(_CORRUPT)
    target, number = path.with_name(name), 2
    while target.exists():
        target, number = path.with_name(f"{name}-{number}"), number + 1
    log.warning("Setting %s aside as %s: %s.", path, target.name, reason)
    path.rename(target)
    flush_folder(path.parent)
    return target


def _not_written(final: Path, error: OSError, num_bytes: int) -> CheckpointError:
    remedy = "Correct the permissions, or pass another --run-dir."
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        remedy = "Free some space, then resume the run."
    return CheckpointError(
        f"{final} could not be written: {os.strerror(error.errno or errno.EIO)}. It needs "
        f"{num_bytes:,} bytes, {_free_bytes(final)} are free there. Earlier checkpoints are "
        f"intact. {remedy}"
    )


def _free_bytes(path: Path) -> str:
    for folder in path.parents:
        try:
            return f"{shutil.disk_usage(folder).free:,}"
        except OSError:
            continue
    return "an unknown number"


def _random_state_of_this_rank(content: CheckpointContent) -> dict[str, Tensor]:
    rank, world_size = ranks.rank(), ranks.world_size()
    seed = int(content.state.get("seed", 0))
    derived = derived_random_state(seed, content.step, rank, world_size)
    if content.world_size == world_size:
        return derived | content.random_state_of(rank)
    if ranks.is_main():
        log.warning(
            "Saved on %d rank(s), resumed on %d: random states (dropout) are derived anew from "
            "seed, step and rank; without dropout the run continues equal to rounding.",
            content.world_size,
            world_size,
        )
    return derived
