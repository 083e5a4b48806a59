"""Feeds a reader damaged samples and counts: it must return, or raise one of our own errors."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from softprompt_dist.errors import SoftpromptError
from softprompt_dist.run.checkpoint_format import InvalidCheckpointError
from tests.fuzz.mutations import Mutate

OWN = (SoftpromptError, InvalidCheckpointError)
SLOWEST_SECONDS = 5.0
"""For one input; a loaded machine is slow, a reader that hangs or explodes is slower."""
_LONGEST_MESSAGE = 20_000


@dataclass(frozen=True)
class Target:
    """A reader, valid samples of what it reads, and how they are damaged."""

    name: str
    read: Callable[[bytes], object]
    samples: Sequence[bytes]
    mutate: Mutate
    share: float
    """How many inputs it gets of each one that is asked for; a little over 1 in all."""
    refuses: bool = True
    """Whether it refuses files; else it says, or leaves out, what is wrong with them."""


@dataclass
class Outcome:
    """What came of a target's inputs."""

    returned: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.returned + self.refused.total()


def file_reader(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """`read` of a file with the content that it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def reading(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return reading


class FoundError(AssertionError):
    """A reader did neither; says which input did it."""


def run(target: Target, inputs: int, seed: int) -> Outcome:
    """The samples as they are, then `inputs` damaged ones."""
    for sample in target.samples:
        target.read(sample)
    chosen = Random(f"{target.name}/{seed}")
    outcome = Outcome()
    begin = time.process_time()
    for number in range(inputs):
        content = target.mutate(chosen, chosen.choice(target.samples))
        _try(target, content, f"{target.name}, seed {seed}, input {number}", outcome)
    outcome.seconds = time.process_time() - begin
    return outcome


def _try(target: Target, content: bytes, place: str, outcome: Outcome) -> None:
    begin = time.process_time()
    try:
        target.read(content)
        outcome.returned += 1
    except OWN as error:
        if not 10 <= len(str(error)) <= _LONGEST_MESSAGE:
            raise FoundError(f"{place}: a message of {len(str(error))} characters") from error
        outcome.refused[type(error).__name__] += 1
    except Exception as error:
        raise FoundError(
            f"{place}: {type(error).__name__}: {error} for {content!r:.2000}"
        ) from error
    seconds = time.process_time() - begin
    outcome.slowest_seconds = max(outcome.slowest_seconds, seconds)
    if seconds > SLOWEST_SECONDS:
        raise FoundError(f"{place}: {seconds:.1f} s for {content!r:.2000}")
