"""100,000 damaged inputs: each is read, or refused with an error of ours; none hangs or explodes.

More of them, with another seed: `python -m tests.fuzz --inputs 1000000 --seed 7`, or the variables
SOFTPROMPT_FUZZ_INPUTS and SOFTPROMPT_FUZZ_SEED.
"""

from __future__ import annotations

import logging
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.campaign import FoundError, Target, run
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.targets import all_targets

INPUTS = int(os.environ.get("SOFTPROMPT_FUZZ_INPUTS", "100000"))
SEED = int(os.environ.get("SOFTPROMPT_FUZZ_SEED", "0"))
_MOST_MEMORY_KIB = 512 * 1024
_IN_MEMORY = "/dev/shm"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Files that are rewritten thousands of times lie in memory, where there is such a place."""
    where = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as path:
        yield Path(path)


def test_every_reader_returns_or_refuses(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = 0
    for target in all_targets(folder):
        outcome = run(target, round(INPUTS * target.share), SEED)
        # Damage that is never seen, or nothing else, would try nothing.
        assert outcome.returned, target.name
        assert bool(outcome.refused) == target.refuses, target.name
        total += outcome.inputs
    assert total >= INPUTS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _MOST_MEMORY_KIB


@pytest.mark.parametrize("error", [ValueError, RecursionError, UnicodeEncodeError])
def test_another_error_would_be_found(error: type[Exception]) -> None:
    def read(content: bytes) -> None:
        if content != b"sample":
            raise error("utf-8", "", 0, 1, "x") if error is UnicodeEncodeError else error("x")

    with pytest.raises(FoundError, match=error.__name__):
        run(Target("broken", read, [b"sample"], mutate_bytes, 1.0), 50, 0)
