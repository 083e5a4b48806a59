"""Checkpoints of an adaptation: sharded tensors, whole in files, for any number of ranks.

step-00010000/model.safetensors   or shards with an index: weights and what is shaped like them
              small.safetensors   tensors that every rank holds
              rng.safetensors     torch's generators, of every rank
              state.json          step, world size, the rest of the state
              manifest.json       kind, step, size and sha256 of the others

Rank 0 writes. All ranks that see the folder read it back before an older one goes, each some of the
files: a disk may return other bytes than it was given. To resume, every rank must see it.
`CheckpointFolder` tells how a checkpoint appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from softprompt_dist.adaptation.sharded_files import (
    WeightFormat,
    num_bytes_of,
    read_into,
    write_tensors,
)
from softprompt_dist.adaptation.sharded_tensor import ShardedTensor
from softprompt_dist.adaptation.verification import (
    check_all_see,
    damage_of,
    inspect_checkpoint,
    sees_all,
    verify,
)
from softprompt_dist.durable import FileDigest, digest_of, explained, pauses, write_file
from softprompt_dist.errors import CheckpointError, SoftpromptError
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.parallel import ranks
from softprompt_dist.run.checkpoint_folder import (
    CheckpointFolder,
    may_pass,
    not_written,
    other_tensors,
    set_aside,
)
from softprompt_dist.run.checkpoint_format import (
    ADAPTATION,
    MANIFEST,
    RANDOM_STATES,
    SMALL,
    STATE,
    InvalidCheckpointError,
    encode_manifest,
    encode_rest,
    tensor_bytes,
)
from softprompt_dist.run.random_state import (
    random_state,
    restore_random_state,
    resumed_random_state,
)

log = logging.getLogger(__name__)

_SHARD_BYTES = 4 * 2**30
"""Several files, so that several ranks can verify them."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A verified checkpoint; the same on every rank."""

    folder: Path
    step: int
    state: dict[str, Any]
    world_size: int
    """Ranks at the save."""

    def read_into(self, tensors: Mapping[str, ShardedTensor]) -> None:
        """All ranks: fill what was saved under these names; others in the file stay unread.

        Raises:
            CheckpointError: on all ranks; one is missing or has another shape.
        """
        read_into(self.folder, tensors, error=CheckpointError)

    def small(self) -> dict[str, Tensor]:
        """All ranks: the tensors that were saved beside the sharded ones, on the CPU."""
        return ranks.together(lambda: self._load(SMALL))

    def restore_rng(self) -> None:
        """All ranks: set torch's generators to where they were at the save.

        On another number of ranks they are derived from `state["seed"]`, step and rank.
        """
        joined = ranks.together(lambda: self._load(RANDOM_STATES))
        own = resumed_random_state(joined, self.world_size, self.state, self.step)
        restore_random_state(own)

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Cannot read {self.folder / name}, which was found valid a moment ago: {error}. "
                "Is another run removing checkpoints there? If not, resume: it is verified again."
            ) from error


class AdaptationCheckpointStore:
    """The checkpoints of one run; the last `keep_last` are kept, and those of `keep_steps`."""

    def __init__(
        self,
        folder: str | Path,
        keep_last: int,
        keep_steps: Collection[int] = (),
        attempt: Attempt | None = None,
    ) -> None:
        self._checkpoints = CheckpointFolder(Path(folder), keep_last, keep_steps, attempt)

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._checkpoints.path

    def save(
        self,
        step: int,
        tensors: Mapping[str, ShardedTensor],
        small: Mapping[str, Tensor],
        state: Mapping[str, Any],
        own_random_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Publish a checkpoint of `step`; all ranks, with equal `small` and JSON-able `state`.

        Every rank's torch generators are saved beside them, as they are now or as
        `own_random_state` has those of this rank. A step that is published already, with the same
        tensors, is left as it is. Where a network disk is away, all of it is tried again.

        Raises:
            CheckpointError: on all ranks, when it cannot be written; earlier ones are intact.
        """
        waits = pauses()
        while True:
            try:
                self._save(step, tensors, small, state, own_random_state)
                return
            except CheckpointError as error:  # raised by all ranks
                if not may_pass(error):
                    raise
                pause = ranks.on_main(lambda: next(waits, None))
                if pause is None:
                    raise
                log.warning("%s Trying again.", error)
            time.sleep(pause)

    def _save(
        self,
        step: int,
        tensors: Mapping[str, ShardedTensor],
        small: Mapping[str, Tensor],
        state: Mapping[str, Any],
        own_random_state: Mapping[str, Tensor] | None,
    ) -> None:
        json.dumps(dict(state))  # a value JSON does not know must stop every rank
        random_states = ranks.gather_objects(dict(own_random_state or random_state()))
        final = self._checkpoints.of_step(step)
        rest = {}
        if ranks.is_main():
            rest = {SMALL: tensor_bytes(small)} | encode_rest(step, state, random_states)
        needed = num_bytes_of(tensors) + sum(map(len, rest.values()))

        def refusal(error: OSError) -> CheckpointError:
            return not_written(final, error, needed)

        temporary = ranks.on_main(explained(self._checkpoints.begin, refusal))
        try:
            weights = WeightFormat(max_shard_bytes=_SHARD_BYTES)
            digests = write_tensors(temporary, tensors, weights, error=refusal)
            finish = partial(self._finish, step, temporary, digests, rest)
            expected = ranks.on_main(explained(finish, refusal))
            if expected is not None:
                damage = _damage(temporary, expected, refusal)
                ranks.on_main(explained(partial(self._publish, step, temporary, damage), refusal))
        finally:
            if ranks.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
        _warn_if_unseen(final)

    def newest(self) -> FoundCheckpoint | None:
        """The valid checkpoint of the highest step, or None where none was ever saved; all ranks.

        Damaged ones met on the way are renamed to `corrupt-step-...` with a warning.

        Raises:
            CheckpointError: on all ranks. Checkpoints are there, but none is valid: never start
                over unasked. Or a rank cannot see them, or another kind of run saved them.
        """
        folder, refusal = self._checkpoints, self._checkpoints.unreadable
        ranks.on_main(explained(folder.remove_leftovers, refusal))
        while path := ranks.on_main(explained(folder.newest, refusal)):
            inspection = ranks.on_main(explained(partial(inspect_checkpoint, path), refusal))
            damage = inspection.damage
            if damage is None:
                check_all_see(path, inspection.expected)
                damage = _damage(path, inspection.expected, refusal)
            if damage is None:
                state, world_size = inspection.state, inspection.world_size
                return FoundCheckpoint(path, inspection.step, state, world_size)
            ranks.on_main(explained(partial(set_aside, path, damage), refusal))
        return None

    def discard_all(self) -> None:
        """Rename all checkpoints, damaged ones too, so that the run starts at step 0; all ranks.

        Raises:
            CheckpointError: the folder may not be changed.
        """
        ranks.on_main(self._checkpoints.discard_all)

    def _finish(
        self,
        step: int,
        temporary: Path,
        weights: Mapping[str, FileDigest],
        rest: Mapping[str, bytes],
    ) -> dict[str, FileDigest] | None:
        """The files that are to be published; None where they are."""
        digests = {**weights, **{name: digest_of(content) for name, content in rest.items()}}
        final = self._checkpoints.of_step(step)
        if _is_published(final, digests):
            self._checkpoints.witness(final)
            return None
        for name, content in rest.items():
            write_file(temporary / name, content)
        manifest = encode_manifest(step, digests, ADAPTATION)
        write_file(temporary / MANIFEST, manifest)
        return digests | {MANIFEST: digest_of(manifest)}

    def _publish(self, step: int, temporary: Path, damage: str | None) -> None:
        def verify(final: Path) -> None:
            if damage is not None:
                raise InvalidCheckpointError(damage)

        self._checkpoints.publish(temporary, self._checkpoints.of_step(step), verify)
        self._checkpoints.remove_older(step)


def _damage(
    path: Path,
    expected: Mapping[str, FileDigest],
    refusal: Callable[[OSError], SoftpromptError],
) -> str | None:
    """All ranks: what is wrong with the files, which are dealt to those that see them."""
    sees = ranks.gather_objects(ranks.is_main() or sees_all(path, expected))
    seeing = [rank for rank in range(ranks.world_size()) if sees[rank]]
    share = {}
    if ranks.rank() in seeing:
        own = sorted(expected)[seeing.index(ranks.rank()) :: len(seeing)]
        share = {name: expected[name] for name in own}
    damage = ranks.together(explained(partial(damage_of, path, share), refusal))
    return next(filter(None, ranks.gather_objects(damage)), None)


def _is_published(final: Path, digests: Mapping[str, FileDigest]) -> bool:
    if not final.exists():
        return False
    try:
        published = verify(final)
    except InvalidCheckpointError as reason:
        set_aside(final, str(reason))
        return False
    tensors = published.keys() - {RANDOM_STATES, STATE}
    if any(digests.get(name) != published[name] for name in tensors):
        raise other_tensors(final)
    log.info("%s is published already.", final)
    return True


def _warn_if_unseen(final: Path) -> None:
    """All ranks: now, and not when the run is resumed days later."""
    blind = [n for n in ranks.gather_objects("" if os.path.isdir(final) else platform.node()) if n]
    if blind and ranks.is_main():
        log.warning(
            "%s was saved, but %s cannot see it (yet). A resume needs every node to: put "
            "--run-dir on a shared file system.",
            final,
            ", ".join(sorted(set(blind))),
        )
