"""Submitting the batch scripts to a cluster, and looking at what becomes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from tests.slurm.cluster import Cluster, wait_until

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "slurm"
VERBS = ("train", "adapt", "evaluate")
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
# Two nodes with a rank each, and little of everything, so that all jobs run at the same time.
_OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
# What the batch script says: when, and as which attempt of a job.
_SAID = re.compile(r"^\[(\d{4}-\S+ \S+)\] \[job \d+\.(\d+)\]", re.MULTILINE)
_Test = TypeVar("_Test", bound=Callable[..., None])


@dataclass
class Job:
    """A job that was submitted."""

    cluster: Cluster
    id: str
    run_dir: Path
    log_file: Path

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm knows now."""
        return self.cluster.job(self.id)

    @property
    def log(self) -> str:
        """Of all attempts."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def ended(self, seconds: float = 120) -> dict[str, str]:
        """What Slurm knows once it is over."""
        wait_until(
            lambda: self.facts["JobState"] in _OVER,
            seconds,
            f"job {self.id} did not end: {self.facts}\n{self.log}",
        )
        return self.facts

    def at_work(self, step: int = 10, restart: int = 0) -> None:
        """Returns once it has published a step of that attempt."""

        def is_at_work() -> bool:
            begun = self.run_dir / f"attempt-{self.id}.{restart}-rank-0.json"
            return begun.exists() and int(self.read("step") or 0) >= step

        wait_until(is_at_work, 60, f"job {self.id} does not reach step {step}: {self.log}")

    def read(self, name: str) -> str:
        """First line of a file in the run directory; empty where there is none."""
        path = self.run_dir / name
        return path.read_text().partition("\n")[0] if path.exists() else ""

    def attempts(self, rank: int = 0) -> list[dict[str, Any]]:
        """What the stand-in noted at each start."""
        files = self.run_dir.glob(f"attempt-*-rank-{rank}.json")
        return [json.loads(file.read_text()) for file in sorted(files)]

    def noted(self) -> dict[str, float]:
        """For the resilience table: requeues, steps that were run twice, and how long each took."""
        times = defaultdict(list)
        for when, restart in _SAID.findall(self.log):
            times[int(restart)].append(datetime.fromisoformat(when))
        found = {"requeues": float(max(times, default=0))}
        waits = [(times[n + 1][0] - times[n][-1]).total_seconds() for n in times if n + 1 in times]
        # Less than nothing: the earlier one was lost, and had its last word when the later ran.
        if waits and min(waits) >= 0:
            found["seconds_to_recover"] = max(waits)
        if (self.run_dir / "steps.log").exists():
            steps = self.steps_run()
            found["steps_redone"] = float(len(steps) - len(set(steps)))
        return found

    def steps_run(self) -> list[int]:
        """Every step that any attempt has run, in order."""
        lines = (self.run_dir / "steps.log").read_text().splitlines()
        return [int(line.split()[1]) for line in lines]


class Lab:
    """A folder with a stand-in trainer, and a cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True)
        package = folder / "stand-in" / "softprompt_dist"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        for verb in VERBS:
            shutil.copy(Path(__file__).with_name("stand_in.py"), package / f"{verb}.py")

    def submit(
        self,
        name: str,
        *arguments: str | Path,
        script: str = "train_xxl.sh",
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Job:
        """`sbatch slurm/SCRIPT` from the lab's folder, for the stand-in; `settings` are its."""
        run_dir = self.folder / name
        overrides = [word for key in settings for word in ("--set", f"{key}={settings[key]}")]
        log = self.folder / f"{name.partition('/')[0]}.log"
        command = [
            *("sbatch", "--parsable", *_OPTIONS, "--time=30", f"--output={log}", *options),
            *(SCRIPTS / script, "--", *arguments, *overrides),
        ]
        variables = self.environ() | {"RUN_DIR": str(run_dir)} | dict(environ or {})
        job = self.cluster.call(*command, environ=variables, folder=self.folder).strip()
        return Job(self.cluster, job, Path(variables["RUN_DIR"]), log)

    def environ(self) -> dict[str, str]:
        """Of whoever submits: nothing of the tests' own but PATH."""
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        return {
            "PATH": os.pathsep.join(programs),
            "HOME": str(self.folder),
            "PYTHONPATH": str(self.folder / "stand-in"),
            "SOFTPROMPT_SLURM": str(SCRIPTS),
            "SOFTPROMPT_SCRATCH": str(self.scratch),
            "SOFTPROMPT_MASTER_ADDR": "127.0.0.1",  # the nodes' names cannot be resolved
        }


def starts(start: Callable[[Lab], Any], cluster: str = "common") -> Callable[[_Test], _Test]:
    """The test's jobs, submitted together with all other tests': most of the time is waiting.

    The fixture `started` is what `start` returns.
    """

    def remember(test: _Test) -> _Test:
        test.start, test.cluster = start, cluster  # type: ignore[attr-defined]
        return test

    return remember
