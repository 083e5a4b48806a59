"""Checkpoints that are there whole or not at all, and are trusted only after their sha256.

Rank 0 alone touches the disk; what it has read and verified is broadcast. So no rank can see
another file, nor resume from another step, and the folder need not be visible to the other nodes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt_dist.durable import patiently, write_file
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.parallel import ranks
from softprompt_dist.run.checkpoint_folder import (
    CheckpointFolder,
    not_written,
    other_tensors,
    set_aside,
)
from softprompt_dist.run.checkpoint_format import (
    CheckpointContent,
    InvalidCheckpointError,
    encode_checkpoint,
    read_checkpoint,
)
from softprompt_dist.run.random_state import (
    random_state,
    restore_random_state,
    resumed_random_state,
)

log = logging.getLogger(__name__)


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

    def __init__(self, folder: str | Path, keep_last: int, attempt: Attempt | None = None) -> None:
        self._checkpoints = CheckpointFolder(Path(folder), keep_last, attempt=attempt)

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._checkpoints.path

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        may_differ: Collection[str] = (),
    ) -> None:
        """Publish a checkpoint of `step`; all ranks, with equal `tensors` and JSON-able `state`.

        Every rank's torch generators are saved beside them. A step that is published already, with
        the same tensors but for those of `may_differ`, is left as it is.

        Raises:
            CheckpointError: on all ranks, when it cannot be written; earlier ones are intact.
        """
        # Here and not only on rank 0: a value JSON does not know must stop every rank.
        json.dumps(dict(state))
        random_states = ranks.gather_objects(random_state())
        ranks.on_main(lambda: self._save(step, tensors, state, random_states, may_differ))

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
        rng = resumed_random_state(
            content.random_states, content.world_size, content.state, content.step
        )
        return Checkpoint(content.step, content.tensors, content.state, rng)

    def discard_all(self) -> None:
        """Rename all checkpoints, damaged ones too, so that the run starts at step 0; all ranks.

        Raises:
            CheckpointError: the folder may not be changed.
        """
        ranks.on_main(self._checkpoints.discard_all)

    def _save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        random_states: list[dict[str, Tensor]],
        may_differ: Collection[str],
    ) -> None:
        final = self._checkpoints.of_step(step)
        files = encode_checkpoint(step, tensors, state, random_states)
        decisive = {name: tensors[name] for name in tensors.keys() - may_differ}
        try:
            patiently(lambda: self._publish(final, files, decisive))
        except OSError as error:
            raise not_written(final, error, sum(map(len, files.values()))) from error
        self._checkpoints.remove_older(step)

    def _is_published(self, final: Path, decisive: Mapping[str, Tensor]) -> bool:
        if not final.exists():
            return False
        try:
            published = read_checkpoint(final).tensors
        except InvalidCheckpointError as reason:
            set_aside(final, str(reason))
            return False
        if not all(
            n in published and torch.equal(published[n], t.cpu()) for n, t in decisive.items()
        ):
            raise other_tensors(final)
        log.info("%s is published already.", final)
        return True

    def _publish(
        self, final: Path, files: Mapping[str, bytes], decisive: Mapping[str, Tensor]
    ) -> None:
        if self._is_published(final, decisive):
            self._checkpoints.witness(final)
            return
        temporary = self._checkpoints.begin()
        try:
            for name, content in files.items():
                write_file(temporary / name, content)
            self._checkpoints.publish(temporary, final, read_checkpoint)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read_newest(self) -> CheckpointContent | None:
        try:
            self._checkpoints.remove_leftovers()
            while path := self._checkpoints.newest():
                try:
                    return read_checkpoint(path)
                except InvalidCheckpointError as reason:
                    set_aside(path, str(reason))
        except OSError as error:
            raise self._checkpoints.unreadable(error) from error
        return None
