"""Memory that this job may use on this node: the machine's, or less where a limit is set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class NodeMemory:
    """Bytes, for all ranks of this job on this node together."""

    available: int
    """That can be had now."""
    total: int
    limit: str | None = None
    """What sets the total; None for the machine itself."""

    @property
    def whose(self) -> str:
        """The end of a sentence: `this machine`, or the limit within it."""
        return f"this job ({self.limit})" if self.limit else "this machine"


def node_memory(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> NodeMemory:
    """What the machine has, what control groups (v1, v2) leave of it, and what Slurm has granted.

    Args:
        root: where `proc` and `sys` are mounted.
        environment: with Slurm's variables.
    """
    machine = psutil.virtual_memory()
    limits = [NodeMemory(int(machine.available), int(machine.total))]
    limits += _of_control_groups(root)
    granted = _granted_by_slurm(environment)
    if granted is not None:
        limits.append(granted)
    least = min(limits, key=lambda memory: memory.total)
    return NodeMemory(min(memory.available for memory in limits), least.total, least.limit)


def _of_control_groups(root: Path) -> Iterator[NodeMemory]:
    """Every limit from this process's group up: that of a parent binds its children, too."""
    for folder, names in _control_groups(root):
        total = _number(folder / names.limit)
        used = _number(folder / names.usage)
        if total is not None and used is not None:
            # The kernel takes back what is cached of files before a limit is met.
            used -= sum(_statistics(folder / "memory.stat").get(key, 0) for key in names.cached)
            yield NodeMemory(max(0, total - used), total, f"{folder / names.limit}")


@dataclass(frozen=True)
class _Names:
    """Of the files of a control group."""

    limit: str
    usage: str
    cached: tuple[str, str]
    mounts: tuple[str, ...]


_V1 = _Names(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    ("sys/fs/cgroup/memory",),
)
_V2 = _Names(
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file"),
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"),
)


def _control_groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux, or hidden
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _V1 if controllers else _V2
        for mount in names.mounts:
            # A container may see its own group as the root, whatever its path is outside.
            own = root / mount / path.lstrip("/")
            above = (folder for folder in own.parents if folder.is_relative_to(root / mount))
            yield from ((folder, names) for folder in (own, *above))


def _number(path: Path) -> int | None:
    """A file's, None where it is not there or says `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistics(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {key: int(value) for key, value in pairs}
    except (OSError, ValueError):
        return {}


def _granted_by_slurm(environment: Mapping[str, str]) -> NodeMemory | None:
    """What `--mem`, `--mem-per-cpu` or `--mem-per-gpu` asked for; 0 is the whole node."""
    if "SLURM_JOB_ID" not in environment:
        return None
    for name, count_name in (
        ("SLURM_MEM_PER_NODE", None),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        amount = environment.get(name, "0")
        count = environment.get(count_name, "0") if count_name else "1"
        if amount.isdecimal() and count.isdecimal() and int(amount) * int(count):
            total = int(amount) * int(count) * _MEBIBYTE
            return NodeMemory(total, total, name)
    return None
