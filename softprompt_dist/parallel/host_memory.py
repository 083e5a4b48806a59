"""How the C library hands out memory on a CPU."""

from __future__ import annotations

import ctypes

# As malloc.h of glibc numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


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
