"""What a benchmark says: a Markdown table, its aims reached or missed, and all numbers as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "softprompt-dist")
GB = 1e9


@dataclass(frozen=True)
class Aim:
    """A number that should not be above (or below) a limit."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is so."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        """One line of Markdown."""
        sign = ">=" if self.at_least else "<="
        verdict = "reached" if self.reached else "**missed**"
        return f"- {self.what}: {self.value:.3g}, aim {sign} {self.limit:g}: {verdict}"


@dataclass
class Report:
    """One benchmark's result."""

    name: str
    title: str
    settings: Mapping[str, Any]
    rows: list[dict[str, str]] = field(default_factory=list)
    """The table; the keys of the first row are its columns."""
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    """Everything measured, for the JSON."""

    def markdown(self) -> str:
        """Title, machine, table, aims."""
        lines = [f"## {self.title}", "", f"`python -m benchmarks.{self.name}` on {describe()}", ""]
        lines += markdown_table(self.rows)
        lines += ["", *self.notes] if self.notes else []
        lines += ["", *map(str, self.aims)] if self.aims else []
        return "\n".join(lines) + "\n"

    def publish(self, folder: Path) -> None:
        """Print the Markdown, and write it beside the JSON as `<name>.md` and `<name>.json`."""
        text = self.markdown()
        print(text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(text, encoding="utf-8")
        values = {
            "benchmark": self.name,
            "machine": machine(),
            "settings": dict(self.settings),
            "table": self.rows,
            "aims": [asdict(aim) | {"reached": aim.reached} for aim in self.aims],
            "measured": self.raw,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    options.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of results and models"
    )
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they were given, for the JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


def markdown_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of a Markdown table; the keys of the first row are the columns."""
    columns = list(rows[0])
    body = [[row.get(column, "") for column in columns] for row in rows]
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *body)]


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe() -> str:
    """The machine in one line."""
    facts = machine()
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v != "not installed")
    return f"{facts['cores']} cores of {facts['processor']}; {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
