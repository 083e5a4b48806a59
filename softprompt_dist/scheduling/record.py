"""`pipeline.json`: which jobs were submitted for which run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.durable import replace_file
from softprompt_dist.errors import ConfigError, MachineError
from softprompt_dist.untrusted import parse_json, read_bounded

FILE = "pipeline.json"
_MAX_BYTES = 2**26


@dataclass(frozen=True)
class SubmittedJob:
    """One `sbatch` that was accepted."""

    id: str
    stage: str
    directories: dict[str, str]
    """Of its parts: index in the array, or "" for a job that is none -> run directory."""
    submitted: str
    """When, in ISO 8601."""
    command: list[str]

    def queue_names(self) -> dict[str, str]:
        """The name that squeue has for each part -> its run directory."""
        return {
            f"{self.id}_{index}" if index else self.id: directory
            for index, directory in self.directories.items()
        }


@dataclass(frozen=True)
class PipelineRecord:
    """The file in the pipeline's directory."""

    directory: Path

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.directory / FILE

    def jobs(self) -> list[SubmittedJob]:
        """All that were ever submitted, oldest first.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            values = parse_json(read_bounded(self.path, _MAX_BYTES))
            return [_job_of(value) for value in values["jobs"]]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.path} cannot be read: {error}. It says which jobs wait already. Look with "
                "`squeue --me`, cancel those of this pipeline, and remove the file."
            ) from error

    def write(self, name: str, jobs: Sequence[SubmittedJob]) -> None:
        """Replace the file, as a whole.

        Raises:
            MachineError: the directory cannot be written.
        """
        values: dict[str, Any] = {"name": name, "jobs": [asdict(job) for job in jobs]}
        content = json.dumps(values, indent=2, ensure_ascii=False).encode()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, content)
        except OSError as error:
            raise MachineError(
                f"The pipeline's directory {self.directory} cannot be written: {error}. Set "
                "`directory` to a folder that you may write, or free space there."
            ) from error


def _job_of(value: dict[str, Any]) -> SubmittedJob:
    job = SubmittedJob(**value)
    if not (isinstance(job.id, str) and job.id.isdecimal() and isinstance(job.directories, dict)):
        raise ValueError(f"a job has the id {job.id!r:.40} and directories {job.directories!r:.80}")
    return job
