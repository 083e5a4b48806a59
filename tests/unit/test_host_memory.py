from __future__ import annotations

import subprocess
import sys

import pytest

_FREE_A_LARGE_TENSOR = """
import sys, torch
from softprompt_dist.parallel.host_memory import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
tensor = torch.ones(1 << 24)
del tensor
print(resident() - before)
"""


def still_resident(setting: str) -> int:
    command = [sys.executable, "-c", _FREE_A_LARGE_TENSOR, setting]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_stays_with_the_process_only_when_told_so() -> None:
    assert still_resident("keep") > 60e6
    assert still_resident("as it is") < 10e6
