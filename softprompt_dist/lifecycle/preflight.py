"""What is looked at on every node before a run's first step, in less than a second.

Whether there is room for what the run will write, whether all nodes see its directory, and whether
one of them computes more slowly than the others: all steps would wait for it.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from softprompt_dist.durable import replace_file
from softprompt_dist.errors import MachineError
from softprompt_dist.outcome_files import not_writable
from softprompt_dist.parallel import ranks

SLOW_RATIO = 1.5
"""A device that takes so many times the median's time is named."""

_SIZE = {"cuda": 4096, "cpu": 384}
"""Of the matrices whose product is timed: 2 ms on a fast GPU, a few on a core."""
_REPETITIONS = 5
_LOOKS = 4
_SECONDS_BETWEEN_LOOKS = 0.1
"""A network file system may show a new file late."""


@dataclass(frozen=True)
class RankFacts:
    """What a rank has found out about itself."""

    host: str
    device: str
    seconds: float
    """Of a matrix product, the fastest of a few."""
    sees_directory: bool = True


def preflight(
    directory: Path,
    needed_bytes: int,
    say: Callable[[str], None],
    *,
    shared_for: str = "",
) -> None:
    """All ranks: refuse a run directory that cannot work; `say` (on rank 0) what makes a run slow.

    Args:
        directory: the run directory, which rank 0 has made.
        needed_bytes: what the run still has to write there.
        say: tells people.
        shared_for: why every node must see the directory; empty where rank 0's seeing it is enough.

    Raises:
        MachineError: on all ranks; it has no room, cannot be written, or is not shared.
    """
    ranks.on_main(lambda: _refuse_without_room(directory, needed_bytes))
    found = look_around(directory)
    if not ranks.is_main():
        found = []
    for sentence in (*describe_slow(found), *describe_blind(directory, found, shared_for)):
        say(sentence)
    ranks.on_main(lambda: _refuse_if_not_shared(directory, found, shared_for))


def look_around(directory: Path) -> list[RankFacts]:
    """All ranks: what each of them has found, in rank order.

    Raises:
        MachineError: on all ranks; rank 0 cannot write into the directory.
    """
    seconds = product_seconds()
    probe = ranks.on_main(lambda: _write_probe(directory))
    device = str(ranks.device())
    found = ranks.gather_objects(RankFacts(socket.gethostname(), device, seconds, _is_seen(probe)))
    if ranks.is_main():
        with suppress(OSError):
            probe.unlink()
    return found


def product_seconds() -> float:
    """Of a matrix product on this rank's device."""
    device = ranks.device()
    matrix = torch.ones(_SIZE[device.type], _SIZE[device.type], device=device)
    if device.type == "cuda":
        matrix = matrix.bfloat16()
    taken = []
    for _ in range(1 + _REPETITIONS):  # the first also sets up its library
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def can_compare(found: Sequence[RankFacts]) -> bool:
    """Whether there are several devices, or several nodes without any."""
    return len({(rank.host, rank.device) for rank in found}) > 1


def describe_slow(found: Sequence[RankFacts]) -> list[str]:
    """A sentence for each device, or node without GPUs, that is much slower than the median.

    Ranks that share a node's cores are compared with no other ranks of that node: which of them is
    given the cores first says nothing of it.
    """
    if not can_compare(found):
        return []
    fastest: dict[tuple[str, str], float] = {}
    for rank in found:
        key = (rank.host, rank.device)
        fastest[key] = min(rank.seconds, fastest.get(key, rank.seconds))
    usual = statistics.median_low(fastest.values())
    return [
        f"{host}, {device}: a matrix product takes {seconds / usual:.1f} times as long as on the "
        "others, and every step waits for the slowest. Is something else running there, or is it "
        "too hot?"
        for (host, device), seconds in fastest.items()
        if seconds > SLOW_RATIO * usual
    ]


def describe_blind(directory: Path, found: Sequence[RankFacts], shared_for: str = "") -> list[str]:
    """A sentence about the nodes that do not see the run directory of rank 0."""
    blind = sorted({rank.host for rank in found if not rank.sees_directory})
    if not blind or shared_for:
        return []
    return [
        f"{', '.join(blind)}: {directory} is not the directory that rank 0 ({found[0].host}) "
        "writes to. What these nodes say of a failure or a hang stays there. Put it on storage "
        "that all nodes share."
    ]


def _refuse_if_not_shared(directory: Path, found: Sequence[RankFacts], shared_for: str) -> None:
    blind = sorted({rank.host for rank in found if not rank.sees_directory})
    if blind and shared_for:
        raise MachineError(
            f"{directory} is not the same directory on {', '.join(blind)} as on rank 0's node, "
            f"{found[0].host}; all nodes must see it {shared_for}. Pass --run-dir with a folder "
            "on storage that they share."
        )


def _refuse_without_room(directory: Path, needed_bytes: int) -> None:
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise not_writable(directory, error) from error
    if free < needed_bytes:
        raise MachineError(
            f"{directory} has {free:,} bytes free, and the run may have to write "
            f"{needed_bytes:,}: checkpoints and results. Free some space, pass another --run-dir, "
            "or lower checkpoint.keep_last."
        )


def _write_probe(directory: Path) -> Path:
    probe = directory / f".seen-{uuid.uuid4().hex}"
    try:
        replace_file(probe, b"")
    except OSError as error:
        raise not_writable(directory, error) from error
    return probe


def _is_seen(probe: Path) -> bool:
    for look in range(_LOOKS):
        if look:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if probe.exists():
            return True
    return False
