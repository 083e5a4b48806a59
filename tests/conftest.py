from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_dist.parallel.extensions import choose_extensions_folder
from tests import runs
from tests.messages import Said
from tests.models import save_enlarged

pytest_plugins = ["tests.drills.plugin"]

_has_gpu = torch.cuda.is_available


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests run on the CPU, also where there is a GPU, unless they are marked `gpu`."""
    wants_gpu = item.get_closest_marker("gpu") is not None
    torch.cuda.is_available = _has_gpu if wants_gpu else lambda: False
    os.environ["DS_ACCELERATOR"] = "cuda" if wants_gpu else "cpu"


@pytest.fixture(scope="session", autouse=True)
def extensions_folder() -> Path:
    """Where DeepSpeed's extensions lie: a test with a cache of its own does not compile them."""
    return choose_extensions_folder()


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random T5 v1.1 with a tokenizer. Shared: copy it before changing anything."""
    return runs.save_t5(tmp_path_factory.mktemp("backbones") / "t5")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a tokenizer. Shared: copy it before changing anything."""
    return runs.save_llama(tmp_path_factory.mktemp("backbones") / "llama")


@pytest.fixture(scope="session")
def lively_t5(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny T5, enlarged: its answers differ from row to row."""
    return save_enlarged(tiny_t5, tmp_path_factory.mktemp("lively") / "t5")


@pytest.fixture(scope="session")
def lively_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, enlarged: its answers differ from row to row."""
    return save_enlarged(tiny_llama, tmp_path_factory.mktemp("lively") / "llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.jsonl, validation.jsonl and test.jsonl."""
    return runs.write_splits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_recipe(tiny_t5: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe file of a run on the tiny T5, replicated, without dropout."""
    folder = tmp_path_factory.mktemp("recipe")
    return runs.write_recipe(folder / "tiny.yaml", runs.tiny_recipe(tiny_t5, tiny_data))


@pytest.fixture(scope="session")
def zero3_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ds_config that shards even the smallest tensors."""
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    path.write_text(json.dumps(runs.PARTITION_EVERYTHING))
    return path


@pytest.fixture
def drilled(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`drilled(steps_redone=..., seconds=...)`: what the resilience table tells of this test."""

    def note(*, steps_redone: int | None = None, seconds: float | None = None) -> None:
        if steps_redone is not None:
            record_property("steps_redone", steps_redone)
        if seconds is not None:
            record_property("seconds_to_recover", seconds)

    return note


@pytest.fixture
def lone_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a verb run in this process as a world of one, and leaves no trace of that world."""
    from softprompt_dist.parallel.join import leave_world

    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    leave_world()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """`said(main, *arguments)`: exit code, standard output and standard error of a verb."""

    def run(main: Callable[..., Any], *arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        from softprompt_dist.parallel.verb import run_verb

        with pytest.raises(SystemExit) as ended:
            run_verb(main, [str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run
