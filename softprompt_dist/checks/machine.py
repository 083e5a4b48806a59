"""The machine under the ranks: devices, bf16, cores, memory, shared memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from softprompt_dist.checks.finding import Finding
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.node_memory import node_memory

GIBIBYTE = 2**30
MEBIBYTE = 2**20
SHARED_MEMORY = Path("/dev/shm")
BUFFER_BYTES_PER_RANK = 66 * MEBIBYTE
"""Written by each rank on the CPU that the `deepspeed` launcher starts (csrc/cpu/comm/shm.cpp)."""
BUFFER_PATTERN = "deepspeed_allreduce_buffer_*"

_NCCL_SHARED_MEMORY = GIBIBYTE
"""NVIDIA's containers are run with --shm-size=1g."""
_EMULATED_FROM = 1.5
"""bf16 done in hardware takes less time than fp32; emulated, several times as much."""


def on_gpu() -> bool:
    """Whether the ranks of this machine would use its GPUs."""
    return ranks.device().type == "cuda"


def check_accelerator() -> list[Finding]:
    """The devices, and the CUDA and NCCL that torch brings."""
    problem = ranks.unusable_gpus()
    if problem:
        return [Finding("accelerator", "fail", "GPUs that cannot be used", problem)]
    if not on_gpu():
        if Path("/proc/driver/nvidia/version").exists() and not torch.version.cuda:
            remedy = "This torch was built without CUDA. Install a build for this driver."
            return [Finding("accelerator", "warn", "an NVIDIA driver, but no use of it", remedy)]
        return [Finding("accelerator", "ok", "none: runs use the CPU and gloo")]
    findings = [Finding("cuda", "ok", f"CUDA {torch.version.cuda}, {_nccl()}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / GIBIBYTE:.0f} GiB"
        findings.append(Finding(f"device {index}", "ok", found))
    return findings


def _nccl() -> str:
    if not torch.distributed.is_nccl_available():
        return "no NCCL"
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def check_bf16(slowdown: float, *, wanted: bool) -> list[Finding]:
    """Whether bf16 is done in hardware here.

    Args:
        slowdown: time of a matrix product in bf16 over the same in fp32; see `bf16_slowdown`.
        wanted: whether the run would use bf16, or may.
    """
    found = f"a matrix product takes {slowdown:.1f} x the time of fp32"
    if slowdown < _EMULATED_FROM:
        return [Finding("bf16", "ok", f"native: {found}")]
    remedy = "bf16 is emulated here: use fp32 (backbone.dtype=fp32)." if wanted else ""
    return [Finding("bf16", "warn" if wanted else "ok", f"emulated: {found}", remedy)]


def bf16_slowdown(size: int = 512, repetitions: int = 5) -> float:
    """Time of a [size, size] matrix product in bf16, divided by that in fp32."""
    matrix = torch.randn(size, size, device=ranks.device())
    fp32 = min(_product_seconds(matrix, repetitions))
    return min(_product_seconds(matrix.bfloat16(), repetitions)) / fp32


def _product_seconds(matrix: torch.Tensor, repetitions: int) -> Iterator[float]:
    torch.mm(matrix, matrix)  # the first call also sets up its library
    for _ in range(repetitions):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if matrix.is_cuda:
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def check_cores_and_memory() -> list[Finding]:
    """Cores this process may use, and memory that is free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = node_memory()
    found = f"{memory.available / GIBIBYTE:.1f} of {memory.total / GIBIBYTE:.1f} GiB free"
    if memory.limit:
        found += f", for this job ({memory.limit})"
    short = memory.available < 4 * GIBIBYTE
    remedy = "The demo's two ranks need about 4 GiB; close other programs." if short else ""
    return [
        Finding("cores", "ok", str(cores)),
        Finding("memory", "warn" if short else "ok", found, remedy),
    ]


def check_shared_memory(num_local_ranks: int, *, on_gpu: bool) -> list[Finding]:
    """Room in /dev/shm, through which the ranks of a machine talk."""
    if not SHARED_MEMORY.is_dir():
        remedy = "The ranks of a machine talk through it: mount a tmpfs there."
        return [Finding("/dev/shm", "warn", "not there", remedy)]
    size, _, free = shutil.disk_usage(SHARED_MEMORY)
    found = f"{free / MEBIBYTE:,.0f} of {size / MEBIBYTE:,.0f} MiB free"
    needed = _NCCL_SHARED_MEMORY if on_gpu else num_local_ranks * BUFFER_BYTES_PER_RANK
    if free >= needed:
        return [Finding("/dev/shm", "ok", found)]
    user = "NCCL" if on_gpu else "DeepSpeed"
    remedy = (
        f"{user} may need {needed / MEBIBYTE:,.0f} MiB there, and crash without. In a container: "
        "--shm-size=1g. Else: mount -o remount,size=1g /dev/shm."
    )
    return [Finding("/dev/shm", "warn", found, remedy)]


def check_shared_memory_leftovers() -> list[Finding]:
    """Buffers of this user's ended ranks: DeepSpeed never deletes them, and they are memory."""
    used = mapped_files()
    left = {
        path: path.stat().st_size
        for path in sorted(SHARED_MEMORY.glob(BUFFER_PATTERN))
        if path.stat().st_uid == os.getuid() and str(path) not in used
    }
    if not left:
        return []
    remedy = f"No process uses them. Delete them: rm {' '.join(map(str, left))}"
    found = f"{sum(left.values()) / MEBIBYTE:,.0f} MiB of ended runs"
    return [Finding("/dev/shm leftovers", "warn", found, remedy)]


def mapped_files() -> set[str]:
    """Files that some process of this machine, among those we may look at, has in its memory."""
    files = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        files |= {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return files
