"""How a run ended, as files: exit codes do not survive srun, and not every end has one.

RUN_DIRECTORY/DONE   the run is complete; its first line is the last step
              STOP   do not run: the batch script gave up, or the user asked for an end
              why    why the latest attempt ended, one line; `running` while it goes on
              step   the last step that a checkpoint was published for

A batch script decides by them whether to queue the job again; see slurm/env.sh and docs/slurm.md.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.durable import patiently, replace_file
from softprompt_dist.errors import CheckpointError, MachineError, SoftpromptError, StopFileError

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SOFTPROMPT_OUTCOME"
"""Where the batch script wants these files, also before Python knows the run directory."""
RUNNING = "running"
_ANEW = ".begun-anew-by"
_LONGEST_REASON = 2000
_BEGUN = time.time()
"""When this process began, about."""
_is_lost: list[Callable[[], bool]] = []


@dataclass(frozen=True)
class OutcomeFiles:
    """The four files, in `folder`."""

    folder: Path

    @property
    def done(self) -> Path:
        """Whether it is there decides: the run is complete."""
        return self.folder / "DONE"

    @property
    def stop(self) -> Path:
        """Whether it is there decides: the run must not go on."""
        return self.folder / "STOP"

    @property
    def why(self) -> Path:
        """Why the latest attempt ended."""
        return self.folder / "why"

    @property
    def step(self) -> Path:
        """The last published step."""
        return self.folder / "step"

    def refuse_if_stopped(self) -> None:
        """Before anything is started.

        Raises:
            StopFileError: there is a STOP file.
        """
        if self.stop.exists():
            reason = first_line(self.stop) or "no reason given"
            raise StopFileError(
                f"{self.stop} says that this run must not go on: {reason}. Remove the file to run "
                "it all the same."
            )

    def forget_earlier_attempts(self) -> None:
        """Whatever ends this process must not be taken for what ended one before it."""
        with suppress(OSError):  # there is none, or it is not ours to write: that is told later
            if self.why.stat().st_mtime < _BEGUN:
                replace_file(self.why, f"{RUNNING}\n".encode(), is_patient=False)

    def begin(self) -> None:
        """An attempt begins: what it will end like is not known.

        Raises:
            StopFileError: there is a STOP file.
        """
        self.refuse_if_stopped()
        replace_file(self.why, f"{RUNNING}\n".encode())

    def begin_again(self) -> None:
        """As `begin`, of a verb that does all of its work anew.

        Raises:
            StopFileError: there is a STOP file.
        """
        self.begin()
        self.done.unlink(missing_ok=True)

    def publish_step(self, step: int) -> None:
        """A checkpoint of `step` is on the disk."""
        replace_file(self.step, f"{step}\n".encode())

    def published_step(self) -> int:
        """The last step that a checkpoint was published for; 0 for none.

        Raises:
            OSError: nobody can tell.
        """
        text = _decisive_line(self.step)
        return int(text) if text.isdecimal() else 0

    def begin_anew(self, job: str = "") -> None:
        """The checkpoints were set aside, for Slurm's `job` if it is one: none is published."""
        self.step.unlink(missing_ok=True)
        if job:
            replace_file(self.folder / _ANEW, f"{job}\n".encode())

    def has_begun_anew(self, job: str) -> bool:
        """Whether an earlier attempt of the same job has done so.

        Raises:
            OSError: nobody can tell.
        """
        return bool(job) and _decisive_line(self.folder / _ANEW) == job

    def check_resumed(self, step: int) -> None:
        """Whether a run that goes on after `step` is as far as it once was.

        Raises:
            CheckpointError: there were checkpoints, and none is left: never start over unasked.
        """
        published = self.published_step()
        if published and not step:
            raise CheckpointError(
                f"{self.step} says that step {published} was saved, but no checkpoint is there. "
                "Bring the folder `checkpoints` back, or start over with --fresh."
            )
        if step < published:
            log.warning("Step %d was saved once; going on after step %d.", published, step)
        if step != published:  # greater after a kill between a checkpoint and its record here
            self.publish_step(step)

    def finish(self, step: int) -> None:
        """The run is complete."""
        replace_file(self.why, b"done\n")
        replace_file(self.done, f"{step}\n".encode())

    def end(self, reason: str) -> None:
        """The attempt ends early, for this reason."""
        line = " ".join(reason.split())[:_LONGEST_REASON]
        replace_file(self.why, f"{line}\n".encode(), is_patient=False)  # who fails has waited


def not_writable(folder: Path, error: OSError) -> MachineError:
    """What to say of a run directory that refuses what a run has to write."""
    return MachineError(
        f"The run directory {folder} cannot be written: {error}. Pass --run-dir with a folder that "
        "you may write, or free space there."
    )


def first_line(path: Path) -> str:
    """Of a small file; empty where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(_LONGEST_REASON).strip()
    except OSError:
        return ""


def _decisive_line(path: Path) -> str:
    """As `first_line`, where a file that cannot be read must not count as one that is not there."""

    def read() -> str:
        try:
            return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        except FileNotFoundError:
            return ""

    return patiently(read)


def announce(folder: Path) -> None:
    """Let `record_failure` know where the run's outcome belongs, unless the batch script said so.

    Called on every rank: whichever fails may be the only one that can tell.
    """
    os.environ.setdefault(FOLDER_VARIABLE, str(folder))


def of_batch_script() -> OutcomeFiles | None:
    """Where a batch script waits for the outcome of a verb without a run directory, if one does."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return OutcomeFiles(Path(folder)) if folder else None


def silent_where(is_lost: Callable[[], bool]) -> None:
    """From now on `record_failure` says nothing where the folder is another attempt's."""
    _is_lost[:] = [is_lost]


def record_failure(failure: SoftpromptError) -> None:
    """Write `why` for an attempt that ends with `failure`; does nothing where no run is known."""
    files = of_batch_script()
    if files is None or not failure.outcome or any(is_lost() for is_lost in _is_lost):
        return
    # The first to speak is nearest to the cause; and a disk that is full has said so already.
    with suppress(OSError):
        files.folder.mkdir(parents=True, exist_ok=True)
        if first_line(files.why) in ("", RUNNING):
            files.end(f"{failure.outcome}: {failure}")
