from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.parallel.join import join_world
from tests import adaptations, corpora


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The one of the demo, as most tests of text and its ids want it."""
    return corpora.tiny_t5()


@pytest.fixture
def world_of_adaptations(
    lone_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world of one in this process, in which an adaptation takes no longer than its steps."""
    adaptations.make_quick(monkeypatch, tmp_path / "cache")
    join_world()


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., AdaptConfig]:
    """`make_config(run, **changes)`: the recipe of a small adaptation in a folder of that name."""
    return lambda run="run", **changes: adaptations.config_of(tmp_path, run, **changes)
