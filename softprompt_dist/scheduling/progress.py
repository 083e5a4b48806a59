"""How far the parts of a pipeline are: done, stopped, waiting or running, or still open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softprompt_dist.outcome_files import OutcomeFiles, first_line
from softprompt_dist.scheduling import programs
from softprompt_dist.scheduling.batch_job import BatchJob, Part
from softprompt_dist.scheduling.record import SubmittedJob


@dataclass(frozen=True)
class PartState:
    """How far one part is."""

    part: Part
    status: Literal["done", "stopped", "queued", "open"]
    reason: str = ""
    """Why it was stopped or ended before; what Slurm says of it in the queue."""
    job: str = ""
    """In the queue: its id, of an array's element ID_INDEX."""


@dataclass(frozen=True)
class StageState:
    """How far a stage is."""

    job: BatchJob
    parts: tuple[PartState, ...]

    def parts_that_are(self, status: str) -> list[PartState]:
        """In order."""
        return [state for state in self.parts if state.status == status]

    @property
    def to_submit(self) -> list[Part]:
        """Parts that nothing is known to run."""
        return [state.part for state in self.parts_that_are("open")]


def stage_state(
    job: BatchJob, submitted: Sequence[SubmittedJob], queue: Mapping[str, str]
) -> StageState:
    """Where each part of a stage stands.

    Args:
        job: the stage.
        submitted: what was submitted before.
        queue: of those, what Slurm still has, with its state there.
    """
    waiting = {
        directory: name
        for each in submitted
        for name, directory in each.queue_names().items()
        if name in queue
    }
    states = (_part_state(part, waiting.get(str(part.directory), ""), queue) for part in job.parts)
    return StageState(job, tuple(states))


def _part_state(part: Part, name: str, queue: Mapping[str, str]) -> PartState:
    files = OutcomeFiles(part.directory)
    if files.done.is_file():
        return PartState(part, "done")
    if files.stop.exists():
        reason = first_line(files.stop) or "no reason given"
        return PartState(part, "stopped", reason)
    if name:
        return PartState(part, "queued", queue[name], name)
    return PartState(part, "open", first_line(files.why))


def untouched(job: BatchJob) -> StageState:
    """A stage of which nothing has been done."""
    return StageState(job, tuple(PartState(part, "open") for part in job.parts))


def all_states(jobs: Sequence[BatchJob], submitted: Sequence[SubmittedJob]) -> list[StageState]:
    """Where each stage stands, by its files and by Slurm's queue.

    Raises:
        SlurmError: jobs were submitted, and Slurm does not say whether they still wait or run.
    """
    unfinished = [each for each in submitted if not _is_done(each)]
    queue = programs.queued([each.id for each in unfinished])
    return [stage_state(job, unfinished, queue) for job in jobs]


def _is_done(job: SubmittedJob) -> bool:
    """Whether Slurm need not be asked about it."""
    return all(OutcomeFiles(Path(each)).done.is_file() for each in job.directories.values())
