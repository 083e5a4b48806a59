"""One attempt at a run: it owns the run directory, is alive, ends when asked, and says how."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from softprompt_dist.errors import SoftpromptError, StoppedError
from softprompt_dist.lifecycle.beside import Beside
from softprompt_dist.lifecycle.heartbeat import Heartbeat
from softprompt_dist.lifecycle.ownership import Owner, Ownership
from softprompt_dist.lifecycle.watchdog import Watchdog, doing, tick, watched
from softprompt_dist.outcome_files import (
    RUNNING,
    OutcomeFiles,
    first_line,
    not_writable,
    of_batch_script,
    silent_where,
)
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.section import HealthConfig

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""How often rank 0 looks for a STOP file and a new owner."""


@contextmanager
def told_to_batch_script(health: HealthConfig, output: Path | None = None) -> Iterator[None]:
    """All ranks: the work of a verb without a run directory; a batch script that waits is told.

    A rank that hangs leaves its stacks in the script's folder, or in `output`.

    Raises:
        StopFileError: on all ranks; there is a STOP file.
    """
    files = of_batch_script()
    if files is not None:
        ranks.on_main(files.begin_again)
    folder = output if files is None else files.folder
    with watched(folder / "stacks" if folder else None, health):
        yield
    if files is not None:
        ranks.on_main(lambda: files.finish(0))


class Attempt:
    """All ranks make one and use it as a context manager, which ends with the attempt.

    Raises:
        DirectoryInUseError: on all ranks; another run is alive in `folder`.
        StopFileError: on all ranks; there is a STOP file.
    """

    def __init__(self, folder: Path, health: HealthConfig, facts: dict[str, Any]) -> None:
        self.files = OutcomeFiles(folder)
        self.health = health
        job = ranks.on_main(self._begin)
        self._ownership = Ownership(folder, job)
        silent_where(self._ownership.is_lost)
        known = {"token": job.token, "host": job.host, "pid": job.pid, "job": job.job}
        known |= {"device": ranks.device_name(), **facts}
        every = health.heartbeat_seconds
        self._heartbeat = Heartbeat(folder, every, known, self._ownership.is_held)
        self._watchdog = Watchdog(folder / "stacks")
        self._phases = ExitStack()
        self._looked = 0.0
        self._found = (0, 0)
        self._looking = Beside(self._look_now)
        self.steps_before = 0
        """Of a run in stages: all steps of the stages before this one, whose own begin at 1."""

    def __enter__(self) -> Attempt:
        """Its heart beats, and it is watched."""
        if ranks.is_main():
            self._heartbeat.start()
        # What is no phase of its own must not hang for ever, either.
        self._phases.enter_context(doing("between phases", self.health.slow_timeout_seconds))
        self._watchdog.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the directory to whoever comes next, with the reason why this attempt has ended."""
        self._watchdog.stop()
        self._phases.close()
        if not ranks.is_main():
            return
        is_ours = not self._ownership.is_lost()
        self._heartbeat.stop(last_beat=is_ours)
        if is_ours and isinstance(error, SoftpromptError) and error.outcome:
            with suppress(OSError):  # a full disk is what `error` may be about
                self._tell(error)
        self._ownership.release()

    def begins_anew(self, is_asked: bool) -> bool:
        """All ranks: whether earlier checkpoints shall be set aside, as `--fresh` asks.

        Slurm starts a job again with the command that it had: what the job's own attempts have
        saved is not set aside.
        """
        owner = self._ownership.owner
        if not is_asked or not owner.restart:
            return is_asked
        return not ranks.on_main(lambda: self.files.has_begun_anew(owner.job))

    def begun_anew(self) -> None:
        """All ranks: the checkpoints were set aside."""
        ranks.on_main(lambda: self.files.begin_anew(self._ownership.owner.job))

    def note(self, **values: Any) -> None:
        """What the heartbeat says from now on: `step`, `steps`, `loss`, `tokens_per_second`."""
        tick()
        if "step" in values:
            values["step"] += self.steps_before
        self._heartbeat.note(**values)

    def reopen(self) -> None:
        """All ranks: from now on the run is not complete, should it have been."""
        ranks.on_main(lambda: self.files.done.unlink(missing_ok=True))

    def check_ours(self) -> None:
        """Before anything is published; rank 0 only, no collective.

        Raises:
            SupersededError: a later attempt has taken over.
            OwnerUnknownError: nobody can tell whether one has, for minutes now.
        """
        self._ownership.check()

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is on the disk; rank 0 only, no collective."""
        if not self._ownership.is_lost():  # since the checkpoint got its name
            try:
                self.files.publish_step(self.steps_before + step)
            except OSError as error:  # the checkpoint is there, and a resume finds it
                log.warning("Step %d is saved, but its number could not be: %s", step, error)

    def finish(self, step: int) -> None:
        """All ranks: the run is complete."""
        ranks.on_main(lambda: self._finish(self.steps_before + step))

    def stop_wanted(self, failed: bool = False) -> str:
        """All ranks: why the run must end at this boundary; empty if it need not.

        Args:
            failed: whether this rank knows of a failure that all must hear of: `"failure"` comes
                back on every rank.

        Raises:
            SupersededError: on all ranks; a later attempt has taken over.
            OwnerUnknownError: on all ranks; nobody can tell whether one has, for minutes now.
        """
        found = [stop.wanted(), *self._look(), int(failed)]
        flags = ranks.all_reduce_max(torch.tensor(found, device=ranks.device())).tolist()
        number, has_stop_file, is_over, has_failed = flags
        if is_over:
            ranks.on_main(self.check_ours)
        if has_failed:
            return "failure"
        if has_stop_file:
            return "STOP file"
        return stop.name_of(number) if number else ""

    def stopped(self, why: str, step: int) -> StoppedError:
        """What to raise on all ranks once the state after `step` is saved."""
        step += self.steps_before
        state = f"after step {step}, which is saved" if step else "before the first step"
        error = StoppedError(f"{why} {state}.")
        if why == "STOP file":
            error.outcome = "stop"
        return error

    def _begin(self) -> Owner:
        folder = self.files.folder
        ownership = Ownership(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.files.refuse_if_stopped()
            ownership.claim()
            self.files.begin()
        except OSError as error:
            raise not_writable(folder, error) from error
        return ownership.owner

    def _finish(self, step: int) -> None:
        self.check_ours()
        self.files.finish(step)

    def _look(self) -> tuple[int, int]:
        if ranks.is_main() and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._looking.run()
        return self._found

    def _look_now(self) -> None:
        self._found = (int(os.path.exists(self.files.stop)), int(self._ownership.is_over()))

    def _tell(self, error: SoftpromptError) -> None:
        # Where nobody knows whose the directory is, what stands there may be another's word.
        if self._ownership.is_held() or first_line(self.files.why) in ("", RUNNING):
            self.files.end(f"{error.outcome}: {error}")
