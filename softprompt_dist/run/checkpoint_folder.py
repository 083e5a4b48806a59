"""The folder with the checkpoints of one run: how one appears, is trusted, set aside and removed.

Nothing here is collective: rank 0 alone calls it.

step-00000020/          published: whole, never changed again
.tmp-step-HEX/          being written, or left by a save that was interrupted
corrupt-step-00000010/  found damaged; discarded-step-...: a fresh start was asked for
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.durable import PASSING, flush_folder, free_bytes, patiently
from softprompt_dist.errors import CheckpointError
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.run.checkpoint_format import MANIFEST, InvalidCheckpointError

log = logging.getLogger(__name__)

_PUBLISHED = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-step-"
_CORRUPT = "corrupt-"
_DISCARDED = "discarded-"


@dataclass(frozen=True)
class CheckpointFolder:
    """Of the published checkpoints, the last `keep_last` are kept, and those of `keep_steps`."""

    path: Path
    keep_last: int
    keep_steps: Collection[int] = ()
    attempt: Attempt | None = None
    """Who publishes: only the run directory's owner may, and says which step is on the disk."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.keep_last < 1:
            raise CheckpointError(
                f"keep_last is {self.keep_last}; at least 1 checkpoint must be kept."
            )

    def of_step(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.path / f"step-{step:08d}"

    def published(self) -> list[tuple[int, Path]]:
        """Step and folder of what bears a checkpoint's name, valid or not, by rising step."""
        if not self.path.exists():
            return []
        named = [(_PUBLISHED.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted((int(match[1]), path) for match, path in named if match)

    def begin(self) -> Path:
        """A new folder to write a checkpoint into.

        Raises:
            OSError: it cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        flush_folder(self.path.parent)
        temporary = self.path / f"{_TEMPORARY}{uuid.uuid4().hex}"
        temporary.mkdir()
        return temporary

    def publish(self, temporary: Path, final: Path, verify: Callable[[Path], object]) -> None:
        """Give what `begin` made, and whose files are flushed, its name, and read it back.

        Raises:
            OSError: it cannot be renamed.
            CheckpointError: it does not read back: `verify` raised InvalidCheckpointError.
            SupersededError: a later attempt has taken the run directory over.
        """
        flush_folder(temporary)
        if self.attempt is not None:
            self.attempt.check_ours()
        try:
            temporary.rename(final)
        except FileNotFoundError:
            if not final.exists():
                raise  # else a network disk has done it, and lost its answer
        flush_folder(self.path)
        try:
            verify(final)
        except InvalidCheckpointError as reason:
            aside = set_aside(final, str(reason))
            raise CheckpointError(
                f"{final} does not read back as written: {reason}. It is kept as {aside.name}; "
                "earlier checkpoints are intact. Check the disk, then resume."
            ) from reason
        self.witness(final)

    def witness(self, final: Path) -> None:
        """Leave word that this checkpoint is on the disk.

        Raises:
            SupersededError: a later attempt has taken the run directory over.
        """
        if self.attempt is not None:
            self.attempt.check_ours()
        match = _PUBLISHED.fullmatch(final.name)
        if self.attempt is not None and match is not None:
            self.attempt.saved(int(match[1]))

    def remove_older(self, step: int) -> None:
        """Keep the checkpoint of `step`, the ones before it that shall be kept, and all later."""
        try:
            older = [(s, path) for s, path in self.published() if s < step]
        except OSError as error:
            log.warning("Older checkpoints than %d could not be looked for: %s", step, error)
            return
        for old_step, path in older[: max(0, len(older) - (self.keep_last - 1))]:
            if old_step in self.keep_steps:
                continue
            try:
                # Without its manifest a half-deleted folder counts as damaged, not as a checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
            except OSError as error:
                log.warning("The old checkpoint %s could not be removed: %s", path, error)

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves have left."""
        for leftover in self.path.glob(f"{_TEMPORARY}*"):
            log.warning("Removing %s, left by a save that was interrupted.", leftover)
            shutil.rmtree(leftover, ignore_errors=True)

    def newest(self) -> Path | None:
        """The published folder of the highest step; None where none was ever saved.

        Raises:
            CheckpointError: there are damaged ones only: a run never starts over unasked.
        """
        published = patiently(self.published)
        if published:
            return published[-1][1]
        damaged = sorted(self.path.glob(f"{_CORRUPT}step-*"))
        if damaged:
            raise CheckpointError(
                f"{self.path} holds {len(damaged)} damaged checkpoint(s) and no valid one, so "
                "the run cannot be resumed. Restore one from a backup, or start over with --fresh."
            )
        return None

    def discard_all(self) -> None:
        """Rename all checkpoints, damaged ones too, so that the run starts at step 0.

        Raises:
            CheckpointError: the folder may not be changed.
        """
        try:
            damaged = sorted(self.path.glob(f"{_CORRUPT}step-*"))
            for path in [*(p for _, p in self.published()), *damaged]:
                _rename_aside(path, _DISCARDED, "a fresh start was asked for")
        except OSError as error:
            raise CheckpointError(
                f"Cannot discard the checkpoints in {self.path}: {error}. Correct the folder's "
                "permissions, or pass another --run-dir."
            ) from error

    def unreadable(self, error: OSError) -> CheckpointError:
        """What to say when the search for checkpoints failed."""
        failure = CheckpointError(
            f"Cannot look for checkpoints in {self.path}: {error}. The folder must be "
            "readable and writable; correct its permissions, or pass another --run-dir."
        )
        return _judged(failure, error)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a damaged checkpoint, with a warning; returns its new name."""
    return _rename_aside(path, _CORRUPT, reason)


def outcome_of_saving(step: int, save: Callable[[], object]) -> str:
    """All ranks: save what there is for a message of another failure, which it must not hide."""
    try:
        save()
    except CheckpointError as failure:
        return f"The state after step {step} could not be saved: {failure}"
    return f"The state after step {step} is saved."


def other_tensors(final: Path) -> CheckpointError:
    """What to say when a step is saved a second time, with other tensors."""
    return CheckpointError(
        f"{final} is published already, with other tensors, and is never "
        "overwritten. Is another run writing here? Use another --run-dir, or --fresh."
    )


def not_written(final: Path, error: OSError, num_bytes: int) -> CheckpointError:
    """What to say when a checkpoint that takes `num_bytes` could not be saved."""
    remedy = "Correct the permissions, or pass another --run-dir."
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        remedy = "Free some space, then resume the run."
    failure = CheckpointError(
        f"{final} could not be written: {os.strerror(error.errno or errno.EIO)}. It needs "
        f"{num_bytes:,} bytes, {free_bytes(final.parent)} are free there. Earlier checkpoints are "
        f"intact. {remedy}"
    )
    return _judged(failure, error)


def may_pass(failure: CheckpointError) -> bool:
    """Whether it was a disk that is away for a moment."""
    return failure.outcome == "error"


def _judged(failure: CheckpointError, error: OSError) -> CheckpointError:
    """Whether a batch script shall try again."""
    if error.errno in PASSING:
        failure.outcome = "error"
    return failure


def _rename_aside(path: Path, prefix: str, reason: str) -> Path:
    name = prefix + path.name.removeprefix(_CORRUPT)
    target, number = path.with_name(name), 2
    while target.exists():
        target, number = path.with_name(f"{name}-{number}"), number + 1
    log.warning("Setting %s aside as %s: %s.", path, target.name, reason)
    path.rename(target)
    flush_folder(path.parent)
    return target
