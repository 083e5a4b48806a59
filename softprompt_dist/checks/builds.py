"""What DeepSpeed compiles on this machine, and what a killed build leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys

from softprompt_dist.checks.finding import Finding, Status
from softprompt_dist.parallel.extensions import (
    EXTENSION,
    choose_extensions_folder,
    is_builder_alive,
    missing_build_tools,
    prefer_own_ninja,
)

_ASYNC_IO_PROBE = (
    "from deepspeed.ops.op_builder import AsyncIOBuilder as B; "
    "print('compatible' if B().is_compatible(verbose=True) else 'incompatible')"
)


def check_build_tools(*, needed: bool) -> list[Finding]:
    """The compiler and ninja; without them weights cannot be sharded or trained on the CPU."""
    prefer_own_ninja()
    missing = missing_build_tools()
    if not missing:
        return [Finding("build tools", "ok", "C++ compiler and ninja")]
    remedy = "Install them (Debian, Ubuntu: apt-get install g++ ninja-build)."
    status: Status = "fail" if needed else "warn"
    return [Finding("build tools", status, f"no {', no '.join(missing)}", remedy)]


def check_build_locks() -> list[Finding]:
    """Locks of killed builds, which torch would wait for without end."""
    folder = choose_extensions_folder()
    findings = []
    for lock in sorted(folder.glob("*/lock")):
        if is_builder_alive(lock):
            findings.append(Finding("build lock", "warn", f"{lock}", "A build is going on: wait."))
        else:
            remedy = f"No process holds it; a build was killed. Delete it: rm '{lock}'."
            findings.append(Finding("build lock", "fail", f"{lock}", remedy))
    return findings or [Finding("build locks", "ok", f"none in {folder}")]


def check_shm_comm(*, needed: bool) -> list[Finding]:
    """The extension through which DeepSpeed joins a world on the CPU: built, or still to be."""
    if not needed:
        return []
    built = any((choose_extensions_folder() / EXTENSION).glob(f"{EXTENSION}*.so"))
    found = "built" if built else "not built yet: the first start compiles it, about a minute"
    return [Finding("op shm_comm", "ok", found)]


def check_async_io(*, needed: bool, on_gpu: bool) -> list[Finding]:
    """The extension that moves weights to and from a local disk, if the recipe off-loads there."""
    if not needed:
        return []
    problem = async_io_problem(on_gpu=on_gpu)
    if not problem:
        return [Finding("op async_io", "ok", "libaio is there")]
    remedy = (
        "backbone.offload=nvme cannot work without it. Install it (Debian, Ubuntu: apt-get install "
        "libaio-dev; others: libaio-devel), or use backbone.offload=cpu."
    )
    return [Finding("op async_io", "fail", problem, remedy)]


def async_io_problem(*, on_gpu: bool) -> str:
    """Why DeepSpeed could not build its `async_io` here; empty if it could."""
    # In a process of its own: DeepSpeed settles at its import which accelerator it is for.
    accelerator = {} if on_gpu else {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _ASYNC_IO_PROBE]
    probe = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | accelerator
    )
    lines = probe.stdout.strip().splitlines()
    if not lines:
        return (probe.stderr.strip().splitlines() or ["DeepSpeed did not answer"])[-1]
    return "" if lines[-1] == "compatible" else "libaio or its header is missing"
