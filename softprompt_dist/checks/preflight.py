"""Whether the devices are alike, and whether all nodes see the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.checks.disk import nearest_existing
from softprompt_dist.checks.finding import Finding
from softprompt_dist.errors import MachineError
from softprompt_dist.lifecycle.preflight import (
    RankFacts,
    can_compare,
    describe_slow,
    look_around,
)
from softprompt_dist.parallel import ranks


def check_devices(folder: Path) -> list[Finding]:
    """All ranks: how long each device takes; none where there is one only.

    Args:
        folder: one that rank 0 may write to.
    """
    return _speed(look_around(folder))


def check_nodes(run_directory: Path) -> list[Finding]:
    """All ranks: their devices, and the run directory as each node sees it; none for one rank."""
    if ranks.world_size() == 1:
        return []
    place = ranks.broadcast_object(nearest_existing(run_directory))
    try:
        found = look_around(place)
    except MachineError as error:
        return [Finding("shared storage", "fail", f"{place} cannot be written", str(error))]
    return [*_speed(found), _sight(place, found)]


def _speed(found: Sequence[RankFacts]) -> list[Finding]:
    if not can_compare(found):
        return []
    times = [rank.seconds * 1e3 for rank in found]
    measured = f"a matrix product takes {min(times):.2f} to {max(times):.2f} ms"
    slow = describe_slow(found)
    status, remedy = ("warn", "\n".join(slow)) if slow else ("ok", "")
    return [Finding("speed of devices", status, measured, remedy)]  # type: ignore[arg-type]


def _sight(place: Path, found: Sequence[RankFacts]) -> Finding:
    blind = sorted({rank.host for rank in found if not rank.sees_directory})
    if not blind:
        return Finding("shared storage", "ok", f"all ranks see {place}")
    remedy = (
        "An adaptation reads its checkpoints on every node, and nodes tell there of failures: put "
        "the run directory on storage that all nodes share (--run-dir)."
    )
    return Finding("shared storage", "warn", f"{place} is another on {', '.join(blind)}", remedy)
