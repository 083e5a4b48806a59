"""`softprompt doctor`: what could stop a run on this machine, found in a minute and not in an hour.

Each check is a function that returns its findings. Under a launcher the collective spans all ranks;
rank 0 reports about its own machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softprompt_dist.cache import cache_directory
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.parallel.verb import VerbParser, run_verb

TESTED_VERSIONS = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
}
"""The versions this release was tested with, as in constraints.txt."""

_OLDEST_TORCH = (2, 10)
_GIBIBYTE = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the table; a remedy wherever the status is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def build_parser() -> VerbParser:
    """Options of `softprompt doctor`."""
    parser = VerbParser("doctor", "Check this machine before a run. Exit code 1 if a check fails.")
    parser.add_argument(
        "--run-dir", metavar="PATH", default="runs", help="where runs will write (default: runs)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    findings = [*check_python(), *check_versions(importlib.metadata.version)]
    if all(f.status != "fail" for f in findings):
        findings += machine_findings(Path(options.run_dir))
        findings += check_collective(debug=options.debug)
    if int(os.environ.get("RANK", "0")) == 0:
        print(table(findings), flush=True)
    if any(finding.status == "fail" for finding in findings):
        sys.exit(1)


def machine_findings(run_directory: Path) -> list[Finding]:
    """Everything about the machine but the collective."""
    return [
        *check_accelerator(),
        *check_build_tools(),
        *check_build_locks(),
        *check_cores_and_memory(),
        *check_folder("run directory", run_directory),
        *check_folder("cache", cache_directory()),
    ]


def check_python() -> list[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return [Finding("python", "warn", found, "Only Linux is tested.")]
    return [Finding("python", "ok", found)]


def check_versions(version_of: Callable[[str], str]) -> list[Finding]:
    """The libraries whose behaviour a run depends on; `version_of` raises for a missing one."""
    findings = []
    for name, tested in TESTED_VERSIONS.items():
        try:
            found = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            remedy = "Install it: pip install -c constraints.txt softprompt-dist."
            findings.append(Finding(name, "fail", "not installed", remedy))
            continue
        findings.append(_version_finding(name, found, tested))
    return findings


def _version_finding(name: str, found: str, tested: str) -> Finding:
    if name == "torch" and _release(found) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        remedy = f"Install torch {oldest} or newer: older ones can be attacked by a crafted file."
        return Finding(name, "fail", found, remedy)
    if _release(found) == _release(tested):
        return Finding(name, "ok", found)
    return Finding(name, "warn", found, f"Tested with {tested}; constraints.txt pins it.")


def _release(version: str) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def check_accelerator() -> list[Finding]:
    """The devices, and whether they know bf16."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("accelerator", "ok", "none: runs use the CPU and gloo")]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / _GIBIBYTE:.0f} GiB"
        if device.major >= 8:
            findings.append(Finding(f"device {index}", "ok", found))
        else:
            remedy = "It has no bf16: use backbone.dtype=fp32."
            findings.append(Finding(f"device {index}", "warn", found, remedy))
    return findings


def check_build_tools() -> list[Finding]:
    """The compiler and ninja; a run fails without them on the CPU only."""
    import torch

    from softprompt_dist.parallel.extensions import missing_build_tools, prefer_own_ninja

    prefer_own_ninja()
    missing = missing_build_tools()
    if not missing:
        return [Finding("build tools", "ok", "C++ compiler and ninja")]
    remedy = "Install them (Debian, Ubuntu: apt-get install g++ ninja-build)."
    status: Literal["warn", "fail"] = "warn" if torch.cuda.is_available() else "fail"
    return [Finding("build tools", status, f"no {', no '.join(missing)}", remedy)]


def check_build_locks() -> list[Finding]:
    """Locks of killed builds, which torch would wait for without end."""
    from softprompt_dist.parallel.extensions import choose_extensions_folder, is_builder_alive

    folder = choose_extensions_folder()
    findings = []
    for lock in sorted(folder.glob("*/lock")):
        if is_builder_alive(lock):
            findings.append(Finding("build lock", "warn", f"{lock}", "A build is going on: wait."))
        else:
            remedy = f"No process holds it; a build was killed. Delete it: rm '{lock}'."
            findings.append(Finding("build lock", "fail", f"{lock}", remedy))
    return findings or [Finding("build locks", "ok", f"none in {folder}")]


def check_cores_and_memory() -> list[Finding]:
    """Cores this process may use, and memory that is free."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIBIBYTE:.1f} of {memory.total / _GIBIBYTE:.1f} GiB free"
    short = memory.available < 4 * _GIBIBYTE
    remedy = "The demo's two ranks need about 4 GiB; close other programs." if short else ""
    return [
        Finding("cores", "ok", str(cores)),
        Finding("memory", "warn" if short else "ok", found, remedy),
    ]


def check_folder(name: str, folder: Path) -> list[Finding]:
    """Space in `folder`, and a write that survives: written, flushed, renamed, deleted again."""
    from softprompt_dist.durable import replace_file

    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    probe = existing / f".softprompt-doctor-{uuid.uuid4().hex}"
    try:
        replace_file(probe, b"probe")
        probe.unlink()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        remedy = "Give this user permission or space there, or choose another place."
        return [Finding(name, "fail", f"{existing}: {error.strerror}", remedy)]
    found = f"{folder}: writable, {free / _GIBIBYTE:.1f} GiB free"
    if free < _GIBIBYTE:
        return [Finding(name, "warn", found, "The demo needs about 1 GiB; free some space.")]
    return [Finding(name, "ok", found)]


def check_collective(*, debug: bool) -> list[Finding]:
    """All ranks: join, sum a one over the ranks, and compare with their number."""
    import torch

    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import join_world, leave_world

    try:
        join_world(debug=debug)
        total = ranks.all_reduce_sum(torch.ones(1, device=ranks.device())).item()
        found = f"{ranks.world_size()} rank(s), sum {total:.0f}"
        leave_world()
    except (SoftpromptError, RuntimeError) as error:
        return [Finding("collective", "fail", "none", str(error))]
    if total != ranks.world_size():
        return [Finding("collective", "fail", found, "The ranks' communication is broken.")]
    return [Finding("collective", "ok", found)]


def table(findings: Iterable[Finding]) -> str:
    """Aligned lines: status, name, what was found; the remedy below where there is one."""
    rows = list(findings)
    width = max(len(finding.name) for finding in rows) + 2
    lines = []
    for finding in rows:
        lines.append(f"{finding.status:<6}{finding.name:<{width}}{finding.found}")
        if finding.remedy:
            lines.append(f"{'':<6}{'':<{width}}-> {finding.remedy}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_verb(main)
