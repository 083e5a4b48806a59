"""Pipelines of batch jobs: recipes in small, and programs that stand for Slurm's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests import adaptations, runs

OPTIONS = {"nodes": 1, "gpus-per-node": 2, "cpus-per-task": 1, "time": "2:00:00"}
"""Of every job of `pipeline_values`."""

_SBATCH = """\
import json, os, sys
folder = os.path.dirname(os.path.abspath(__file__))
words, is_test = sys.argv[1:], "--test-only" in sys.argv
name = next(word for word in words if word.startswith("--job-name=")).rpartition("-")[2]
control = json.load(open(folder + "/control.json"))
if name in control["refuses_test" if is_test else "refuses"]:
    sys.exit("sbatch: error: Batch job submission failed: Requested node configuration is not "
             "available")
if is_test:
    sys.exit(print("sbatch: Job 1 to start at noon", file=sys.stderr))
with open(folder + "/submitted.jsonl", "a+") as file:
    file.seek(0)
    number = 101 + len(file.readlines())
    file.write(json.dumps({"words": words, "environment": dict(os.environ)}) + "\\n")
print(f"{number};cluster")
"""
_SQUEUE = """\
import json, os, sys
folder = os.path.dirname(os.path.abspath(__file__))
queue = json.load(open(folder + "/control.json"))["queue"]
asked = next(word for word in sys.argv if word.startswith("--jobs="))[7:].split(",")
if asked == ["100"]:
    sys.exit("slurm_load_jobs error: Invalid job id specified")
for job, state in queue.items():
    if job.partition("_")[0] in asked:
        print(job, state)
"""


class FakeSlurm:
    """`sbatch` and `squeue` in a folder: what was submitted is kept, and nothing runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, body in {"sbatch": _SBATCH, "squeue": _SQUEUE}.items():
            (folder / name).write_text(f"#!{sys.executable} -SE\n{body}")
            (folder / name).chmod(0o755)
        self.control()

    def control(
        self,
        *,
        refuses: Sequence[str] = (),
        refuses_test: Sequence[str] = (),
        queue: Mapping[str, str] | None = None,
    ) -> None:
        """From now on stages are refused, in earnest or by --test-only, and jobs wait or run."""
        values = {"refuses": refuses, "refuses_test": refuses_test, "queue": dict(queue or {})}
        (self.folder / "control.json").write_text(json.dumps(values))

    @property
    def submitted(self) -> list[dict[str, Any]]:
        """`words` and `environment` of each accepted sbatch; the first is job 101."""
        path = self.folder / "submitted.jsonl"
        return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []

    @property
    def path(self) -> str:
        """For PATH."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"


def option(words: Sequence[str], name: str) -> str | None:
    """Value of an option of sbatch."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found[-1] if found else None


def pipeline_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """All three stages on a tiny T5 and two tasks of SuperGLUE, whose files are made here."""
    adapt = adaptations.recipe_values(folder, name="small", objective="prefix_lm", steps=20)
    (folder / "adapt.yaml").write_text(yaml.safe_dump(adapt))
    rows = folder / "superglue"
    rows.mkdir(exist_ok=True)
    tune = runs.tiny_recipe(folder, folder) | {"steps": 20}
    tune["task"] = {"catalogue": "boolq", "source": {"kind": "superglue", "path": str(rows)}}
    (folder / "tune.yaml").write_text(yaml.safe_dump(tune))
    values = {
        "name": "small",
        "directory": str(folder / "pipeline"),
        "sbatch": OPTIONS,
        "adapt": {"recipe": str(folder / "adapt.yaml")},
        "tune": {
            "recipe": str(folder / "tune.yaml"),
            "tasks": ["boolq", "cb"],
            "seeds": [0, 1],
            "parallel": 2,
        },
        "evaluate": {"split": "validation"},
    }
    return values | changes


def changed_stage(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A stage of `pipeline_values` with some keys changed."""
    own: dict[str, Any] = pipeline_values(folder)[name]
    return own | changes


def write_pipeline(folder: Path, values: Mapping[str, Any]) -> Path:
    """The recipe as a file."""
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return path
