"""The programs of Slurm: asked with lists of arguments, never through a shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from softprompt_dist.errors import MachineError

_SECONDS = 120.0
"""A busy controller may take a while."""
_JOB_ID = re.compile(r"(\d+)(;\S*)?")
_NO_SUCH_JOB = "Invalid job id"


class SlurmError(MachineError):
    """A program of Slurm is missing, refuses, or does not answer."""

    exit_code = 1


def is_installed(program: str) -> bool:
    """Whether it is on PATH."""
    return shutil.which(program) is not None


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run `sbatch --parsable ...`; returns the job's id.

    Raises:
        SlurmError: sbatch refuses, in its own words, or gives no id.
    """
    done = _run(command, environment)
    found = _JOB_ID.fullmatch(done.stdout.strip())
    if done.returncode or found is None:
        raise SlurmError(f"sbatch refuses: {_words(done)}")
    return found[1]


def would_take(command: Sequence[str], environment: Mapping[str, str]) -> tuple[bool, str]:
    """Run `sbatch --test-only ...`: whether Slurm would take the job, and what it says of it.

    Raises:
        SlurmError: sbatch is missing or does not answer.
    """
    done = _run(command, environment)
    return done.returncode == 0, _words(done)


def queued(job_ids: Sequence[str]) -> dict[str, str]:
    """State of each of these jobs that waits or runs; of an array, of each element ID_INDEX.

    Raises:
        SlurmError: squeue fails.
    """
    if not job_ids:
        return {}
    format_of = "--format=%i %T"
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(job_ids)}", format_of]
    done = _run(command, None)
    if done.returncode and _NO_SUCH_JOB in done.stderr:
        return {}  # so it says of a single job that has ended long ago
    if done.returncode:
        raise SlurmError(
            f"squeue fails: {_words(done)} Without it nobody knows which jobs wait already; try "
            "again when the controller answers."
        )
    pairs = (line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())
    return {job: state.strip().lower() for job, state in pairs}


def _run(
    command: Sequence[str], environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    program = command[0]
    try:
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{program} is not on PATH. Submit from a login node of the cluster, or load its Slurm "
            "module; `softprompt slurm render` shows the commands without it."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{program} has not answered for {_SECONDS:.0f} s. See with `squeue --me` what Slurm "
            "has taken, then try again."
        ) from error
    except (OSError, ValueError) as error:
        raise SlurmError(f"{program} cannot be started: {error}.") from error


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What the program said, without its name in front of every line."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    program = str(done.args[0])
    said = [line.removeprefix(f"{program}: ").removeprefix("error: ").strip() for line in lines]
    return "; ".join(line for line in said if line) or f"exit code {done.returncode}, no message."
