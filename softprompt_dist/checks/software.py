"""The interpreter and the libraries. Nothing heavy is imported here before a check needs it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import sys
from collections.abc import Callable

from softprompt_dist.checks.finding import Finding, Status
from softprompt_dist.private_names import PRIVATE_NAMES, TESTED_VERSIONS, missing_names

TESTED_BITSANDBYTES = "0.50.2"
"""Apart from the others: only some recipes need it."""

_OLDEST_TORCH = (2, 10)
_TOLERATED_ERROR = 0.2
"""Of a 4-bit copy, relative to the norm of what was copied; 0.1 is normal."""

VersionOf = Callable[[str], str]


def check_python() -> list[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return [Finding("python", "warn", found, "Only Linux is tested.")]
    return [Finding("python", "ok", found)]


def check_versions(version_of: VersionOf = importlib.metadata.version) -> list[Finding]:
    """The libraries whose behaviour a run depends on; `version_of` raises for a missing one."""
    findings = []
    for name, tested in TESTED_VERSIONS.items():
        try:
            found = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            remedy = "Install it: pip install -c constraints.txt softprompt-dist."
            findings.append(Finding(name, "fail", "not installed", remedy))
            continue
        missing = missing_names(name) if name in PRIVATE_NAMES else []
        if missing:
            remedy = f"Install the version that has them: pip install {name}=={tested}."
            findings.append(Finding(name, "fail", f"{found} lacks {', '.join(missing)}", remedy))
        else:
            findings.append(_version_finding(name, found, tested))
    return findings


def check_bitsandbytes(
    *, needed_for: str | None = None, version_of: VersionOf = importlib.metadata.version
) -> list[Finding]:
    """Whether bitsandbytes is there and its 4-bit and 8-bit operations work on this device.

    Args:
        needed_for: the recipe's setting that cannot do without; None: nothing fails.
        version_of: raises for a package that is not installed.
    """
    status: Status = "fail" if needed_for else "warn"
    purpose = needed_for or "backbone.quantization=llm_int8 or nf4"
    try:
        version = version_of("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        remedy = f"Needed for {purpose}: pip install 'softprompt-dist[gpu]'."
        return [Finding("bitsandbytes", status, "not installed", remedy)]
    problem = bitsandbytes_problem()
    if problem:
        remedy = (
            f"{purpose} would fail. Install a release that knows this machine's CUDA version "
            "(python -m bitsandbytes says what it finds), or use backbone.quantization=int8."
        )
        return [Finding("bitsandbytes", status, f"{version}: {problem}", remedy)]
    return [_version_finding("bitsandbytes", version, TESTED_BITSANDBYTES)]


def bitsandbytes_problem() -> str:
    """What went wrong in a small 4-bit and a small 8-bit operation; empty if nothing did."""
    import torch

    from softprompt_dist.parallel import ranks

    # It advises an optional package on every import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional

        weight = torch.randn(64, 64, device=ranks.device())
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        error_4bit = (functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
        rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
        error_8bit = (rows * scales[:, None] / 127 - weight).norm() / weight.norm()
    except Exception as error:  # a native library fails in ways of its own
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    worst = max(error_4bit.item(), error_8bit.item())
    return "" if worst < _TOLERATED_ERROR else f"wrong values (relative error {worst:.2f})"


def _version_finding(name: str, found: str, tested: str) -> Finding:
    if name == "torch" and _release(found) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        remedy = f"Install torch {oldest} or newer: older ones can be attacked by a crafted file."
        return Finding(name, "fail", found, remedy)
    # A patch may change what is private.
    digits = 3 if name in PRIVATE_NAMES else 2
    if _release(found, digits) == _release(tested, digits):
        return Finding(name, "ok", found)
    return Finding(name, "warn", found, f"Tested with {tested}; constraints.txt pins it.")


def _release(version: str, digits: int = 2) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:digits])
