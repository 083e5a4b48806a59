from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.parallel.join import join_world

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


_PIN_EXACTLY = """
import torch
from softprompt_dist.parallel.host_memory import pin_exactly

assert pin_exactly() and pin_exactly()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "pinned_max_cached_size_mb:1"),
        ("expandable_segments:True", "expandable_segments:True,pinned_max_cached_size_mb:1"),
        ("pinned_max_cached_size_mb:64", "pinned_max_cached_size_mb:64"),
    ],
)
def test_page_locked_memory_is_asked_for_exactly_beside_what_the_user_set(
    before: str, after: str
) -> None:
    command = [sys.executable, "-c", _PIN_EXACTLY]
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": before}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == after


@pytest.mark.usefixtures("lone_process")
def test_off_loading_asks_for_it(tiny_t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join_world()
    from softprompt_dist.backbone import sharding

    asked: list[bool] = []
    monkeypatch.setattr(sharding, "pin_exactly", lambda: asked.append(True))
    for offload, expected in (("none", []), ("cpu", [True])):
        section = {"path": str(tiny_t5), "sharding": "zero3", "offload": offload}
        load_backbone(BackboneConfig.model_validate(section))
        assert asked == expected
