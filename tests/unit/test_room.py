"""What cannot fit is refused before a weight is read."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from softprompt_dist.backbone import load
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import MachineError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.session import train

Memory = namedtuple("Memory", "total available")


def test_a_machine_that_is_too_small_is_refused_before_loading(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10**6, 10**6))
    monkeypatch.setattr(load, "fill", fail)
    config = load_recipe(TuneConfig, tiny_recipe, [f"run_directory={tmp_path / 'run'}"])
    with pytest.raises(MachineError, match=r"needs .* GB of memory for 1 rank.*softprompt plan"):
        train(config)
