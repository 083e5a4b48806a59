"""What a run ran on: enough to repeat it, and nothing secret."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import softprompt_dist
from softprompt_dist.parallel import ranks
from softprompt_dist.redaction import redact_command

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "pydantic",
    "sentencepiece",
    "tensorboard",
    "gguf",
)


def describe_environment() -> dict[str, Any]:
    """Time, command, versions, commit and hardware of this process, JSON-able; no collective.

    Only named facts are taken: the environment's variables are not, for they hold secrets.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": redact_command(sys.orig_argv),
        "world_size": ranks.world_size(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "softprompt_dist": softprompt_dist.__version__,
        "commit": _commit(Path(softprompt_dist.__file__).parent.parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "os": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(repository: Path) -> str | None:
    """Commit of a checkout, `-dirty` where files differ; None for an installed package."""
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[dict[str, Any]]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]
