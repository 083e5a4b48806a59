"""How memory of the node is handed out: by the C library, and page-locked by torch."""

from __future__ import annotations

import ctypes

import torch

# As malloc.h of glibc numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_EXACT_ABOVE = "pinned_max_cached_size_mb"
"""torch's setting: more MB than that are neither rounded up nor kept for later."""


def keep_freed_memory() -> bool:
    """Let this process use again what it frees, instead of giving it back to the kernel.

    glibc maps each large tensor anew and unmaps it when it is freed, and the kernel clears every
    page of it again, which a training step on a CPU feels. What is resident then stays near its
    peak.

    Returns:
        Whether the C library can be told so (glibc can).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def pin_exactly() -> bool:
    """Let page-locked memory be of the size that is asked for; before any of it is.

    torch rounds each piece up to a power of two, so that it can be used again: a Llama of 70 B
    off-loaded by eight GPUs would take 174 GB of their node where 139 GB are needed. Its
    `pinned_max_round_threshold_mb` alone would not do: of two unequal pieces of one power of two it
    may give the smaller one again for the larger.

    Returns:
        Whether torch can be told so (2.13 can). What its user has set stays.
    """
    try:
        settings = torch._C._accelerator_getAllocatorSettings()  # noqa: SLF001 - no public reader
        if _EXACT_ABOVE not in settings:
            wanted = [settings] if settings else []
            torch._C._accelerator_setAllocatorSettings(  # noqa: SLF001 - nor a public writer
                ",".join([*wanted, f"{_EXACT_ABOVE}:1"])
            )
    except (AttributeError, RuntimeError, ValueError):  # an older torch
        return False
    return True
