"""The memory that a job may use, in control groups of both versions and under Slurm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from softprompt_dist.parallel.node_memory import node_memory

JOB = {"SLURM_JOB_ID": "7"}
MIB = 2**20
CASES = {
    "no limit": ("0::/job\n", {"sys/fs/cgroup/job/memory.max": "max"}, {}, (900, 1000, None)),
    "v2": (
        "0::/job/step\n",
        {
            "sys/fs/cgroup/job/step/memory.max": "max",
            "sys/fs/cgroup/job/step/memory.current": "70",
            "sys/fs/cgroup/job/memory.max": "400",
            "sys/fs/cgroup/job/memory.current": "150",
            "sys/fs/cgroup/job/memory.stat": "anon 90\ninactive_file 40\nactive_file 10\n",
        },
        {},
        (300, 400, "/job/memory.max"),
    ),
    "v2 in a container, whose path is the host's": (
        "0::/kubepods/pod1\n",
        {"sys/fs/cgroup/memory.max": "300", "sys/fs/cgroup/memory.current": "100"},
        {},
        (200, 300, "cgroup/memory.max"),
    ),
    "v1": (
        "5:cpu,cpuacct:/other\n4:memory:/slurm/job\n0::/\n",
        {
            "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": "500",
            "sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes": "200",
            "sys/fs/cgroup/memory/slurm/job/memory.stat": "cache 9\ntotal_inactive_file 50\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "700",
        },
        {},
        (350, 500, "/slurm/job/memory.limit_in_bytes"),
    ),
    "a group that is full": (
        "0::/\n",
        {"sys/fs/cgroup/memory.max": "300", "sys/fs/cgroup/memory.current": "310"},
        {},
        (0, 300, "memory.max"),
    ),
    "--mem": ("", {}, {**JOB, "SLURM_MEM_PER_NODE": "2"}, (2 * MIB, 2 * MIB, "SLURM_MEM_PER_NODE")),
    "--mem=0": ("", {}, {**JOB, "SLURM_MEM_PER_NODE": "0"}, (900 * MIB, 1000 * MIB, None)),
    "--mem-per-cpu": (
        "",
        {},
        {**JOB, "SLURM_MEM_PER_CPU": "3", "SLURM_CPUS_ON_NODE": "4"},
        (12 * MIB, 12 * MIB, "SLURM_MEM_PER_CPU"),
    ),
    "--mem-per-gpu": (
        "",
        {},
        {**JOB, "SLURM_MEM_PER_GPU": "5", "SLURM_GPUS_ON_NODE": "8"},
        (40 * MIB, 40 * MIB, "SLURM_MEM_PER_GPU"),
    ),
    "outside of a job": ("", {}, {"SLURM_MEM_PER_NODE": "2"}, (900 * MIB, 1000 * MIB, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_least_limit_is_what_the_job_has(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, files, environment, (available, total, limit) = CASES[case]
    scale = 1 if groups else MIB
    machine = SimpleNamespace(available=900 * scale, total=1000 * scale)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = node_memory(tmp_path, environment)
    assert (found.available, found.total) == (available, total)
    assert (found.limit or "").endswith(limit or "")
    assert (found.limit is None) == (limit is None)
