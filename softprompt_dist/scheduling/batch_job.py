"""A batch job as text and arguments; nothing here starts a program."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from softprompt_dist.scheduling.batch_script import gpus_per_node, tasks_of

CONTRACT = (
    *("RECIPE", "RUN_DIR", "DS_CONFIG", "PROMPT", "TASKS", "SEEDS", "SWEEP_DIR", "SWEEP_VERB"),
    *("SOFTPROMPT_AFTER", "SOFTPROMPT_SLURM", "SOFTPROMPT_OUTCOME"),
)
"""Variables that the batch scripts read. One that a job does not set must not come to it from the
user's shell."""
_KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
_DECIDED = ("SBATCH_ARRAY_INX", "SBATCH_EXPORT", "SBATCH_WAIT")
_WITH_VALUE = ("sbatch", "--set", "--split", "--deepspeed_config")
_ON_ONE_LINE = 100


@dataclass(frozen=True)
class Part:
    """What becomes DONE by itself: a job, or an element of an array."""

    title: str
    directory: Path
    """Where its DONE, STOP and why lie."""
    index: int | None = None
    """In the array; None for a job that is none."""


@dataclass(frozen=True)
class BatchJob:
    """One stage of a pipeline, as `sbatch` is told."""

    stage: str
    script: Path
    name: str
    log_folder: Path
    log_name: str
    """With Slurm's own %-patterns."""
    parts: tuple[Part, ...]
    own_options: Mapping[str, str]
    """The recipe's, by long names; "" for one without a value."""
    all_options: Mapping[str, str]
    """With those in the script."""
    environment: Mapping[str, str]
    arguments: tuple[str, ...]
    parallel: int | None = None

    def command(
        self,
        parts: Sequence[Part],
        after: Sequence[str] = (),
        *,
        test_only: bool = False,
    ) -> list[str]:
        """The words of `sbatch` for some parts of the stage.

        Args:
            parts: those to run.
            after: ids of the jobs, or of elements, that must have ended well before.
            test_only: whether Slurm shall only say if it would take the job.
        """
        words = ["sbatch", "--test-only" if test_only else "--parsable", "--export=ALL"]
        folder = str(self.log_folder).replace("%", "%%")
        defaults = {"job-name": self.name, "output": f"{folder}/{self.log_name}"}
        words += map(_option, *zip(*(defaults | dict(self.own_options)).items(), strict=True))
        indices = [part.index for part in parts if part.index is not None]
        if indices:
            throttle = f"%{self.parallel}" if self.parallel else ""
            words.append(f"--array={ranges(indices)}{throttle}")
        if after and not test_only:
            words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        return [*words, str(self.script), *self.arguments]

    @property
    def tasks(self) -> tuple[int, int] | None:
        """Nodes of a part and tasks on each; None where they cannot be told."""
        return tasks_of(self.all_options)

    @property
    def gpus_per_node(self) -> int | None:
        """None where no GPUs are asked for."""
        return gpus_per_node(self.all_options)


def job_environment(environ: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """What `sbatch` runs in: the user's environment, with this job's variables only.

    Inside another job its Slurm variables would be taken for wishes about this one.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name not in CONTRACT
        and name not in _DECIDED
        and (not name.startswith("SLURM_") or name in _KEPT)
    }
    return kept | dict(own)


def shell_lines(environment: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """A command as one types it into a shell, a variable, an option or a setting on each line."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    lines = [*assignments, *_grouped([shlex.quote(word) for word in words])]
    if sum(map(len, lines)) + len(lines) <= _ON_ONE_LINE:
        return [" ".join(lines)]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def ranges(indices: Iterable[int]) -> str:
    """`0-2,5` for 0, 1, 2 and 5."""
    ordered = sorted(indices)
    runs = groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _option(name: str, value: str) -> str:
    return f"--{name}={value}" if value else f"--{name}"


def _grouped(words: Sequence[str]) -> list[str]:
    """What belongs together on one line."""
    lines: list[str] = []
    for word in words:
        if lines and (lines[-1] in _WITH_VALUE or word == "--"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
