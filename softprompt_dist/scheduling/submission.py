"""A pipeline is submitted: what is missing, each stage behind what it waits for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from softprompt_dist.errors import MachineError, SoftpromptError
from softprompt_dist.scheduling import programs
from softprompt_dist.scheduling.batch_job import BatchJob, job_environment
from softprompt_dist.scheduling.progress import PartState, StageState
from softprompt_dist.scheduling.record import PipelineRecord, SubmittedJob


class SubmissionError(SoftpromptError):
    """Some jobs of a pipeline were submitted, and then one was not."""

    exit_code = 1


@dataclass
class Submission:
    """What `softprompt slurm pipeline` does, and what it has done."""

    name: str
    record: PipelineRecord
    known: list[SubmittedJob]
    """Submitted by earlier calls."""
    environ: Mapping[str, str]
    submitted: list[SubmittedJob] = field(default_factory=list)
    """By this one."""

    def submit(self, states: Sequence[StageState]) -> Iterator[str]:
        """Submit what is open of each stage; yields a line when it is done.

        Raises:
            MachineError: the directory cannot be written; nothing was submitted.
            SubmissionError: Slurm refuses a job; names those that it has taken.
        """
        self.record.write(self.name, self.known)
        waits_for: list[str] = []
        for state in states:
            own = names_in_queue(state)
            if state.to_submit:
                job = self._submit_stage(state, waits_for)
                own.append(job.id)
                yield f"submitted {heading(state)}: {job.id}"
            waits_for = own

    def _submit_stage(self, state: StageState, after: Sequence[str]) -> SubmittedJob:
        command = state.job.command(state.to_submit, after)
        try:
            state.job.log_folder.mkdir(parents=True, exist_ok=True)
            job_id = programs.submit(command, job_environment(self.environ, state.job.environment))
            job = _submitted(job_id, state, command)
            self.submitted.append(job)
            self.record.write(self.name, [*self.known, *self.submitted])
        except (MachineError, OSError) as error:
            raise self._refused(state.job, error) from error
        return job

    def _refused(self, job: BatchJob, error: Exception) -> SubmissionError:
        told = f"{job.stage} could not be submitted: {error}"
        if not self.submitted:
            return SubmissionError(f"{told} No job was submitted.")
        jobs = ", ".join(f"{each.id} ({each.stage})" for each in self.submitted)
        return SubmissionError(
            f"{told} Submitted before it: {jobs}. They go on; the same command submits the rest "
            f"later. To cancel them: {cancel_command(self.submitted)}"
        )


def names_in_queue(state: StageState) -> list[str]:
    """What a later stage waits for: jobs and elements that still wait or run."""
    return [part.job for part in state.parts_that_are("queued")]


def cancel_command(jobs: Sequence[SubmittedJob]) -> str:
    """The command that ends these jobs."""
    return shlex.join(["scancel", *(job.id for job in jobs)])


def placeholder(state: StageState) -> str:
    """Stands for the id of a job that is not submitted."""
    return f"{state.job.stage.upper()}_JOB"


def commands(states: Sequence[StageState]) -> Iterator[tuple[StageState, list[str]]]:
    """What would be submitted, with placeholders for ids that are not known yet."""
    waits_for: list[str] = []
    for state in states:
        own = names_in_queue(state)
        if state.to_submit:
            yield state, state.job.command(state.to_submit, waits_for)
            own.append(placeholder(state))
        waits_for = own


def heading(state: StageState) -> str:
    """What a command is about."""
    parts = state.to_submit
    if parts[0].index is None:
        return f"{state.job.stage}: one job"
    return f"{state.job.stage}: an array of {len(parts)} element(s)"


def still_queued(states: Sequence[StageState], known: Sequence[SubmittedJob]) -> list[SubmittedJob]:
    """Jobs of earlier calls that still wait or run."""
    ids = {name.partition("_")[0] for state in states for name in names_in_queue(state)}
    return [job for job in known if job.id in ids]


def part_line(state: StageState, part: PartState) -> str:
    """Where a part stands and what follows."""
    name = f"{state.job.stage:<9}{part.part.title}".rstrip()
    if part.status == "done":
        return f"{name}: done ({part.part.directory})"
    if part.status == "queued":
        return f"{name}: {part.reason} as {part.job}"
    if part.status == "stopped":
        return f"{name}: stopped: {part.reason}"
    return f"{name}: to submit" + (f"; its last attempt: {part.reason}" if part.reason else "")


def _submitted(job_id: str, state: StageState, command: Sequence[str]) -> SubmittedJob:
    directories = {
        "" if part.index is None else str(part.index): str(part.directory)
        for part in state.to_submit
    }
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return SubmittedJob(job_id, state.job.stage, directories, now, list(command))
