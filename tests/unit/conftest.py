from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.parallel import stop
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


@pytest.fixture
def listening() -> Iterator[None]:
    """Signals are remembered, as in a verb that can be asked to stop."""
    stop.listen()
    yield
    stop.forget()


@pytest.fixture
def signalled_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`signalled_in(place, name, call=1)`: in that call of a function this process is signalled."""

    def arrange(place: Any, name: str, call: int = 1, number: int = signal.SIGUSR1) -> None:
        function, calls = getattr(place, name), 0

        def interrupted(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), number)
            return function(*arguments, **settings)

        monkeypatch.setattr(place, name, interrupted)

    return arrange
