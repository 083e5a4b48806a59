from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from softprompt_dist.checks.preflight import check_devices, check_nodes
from softprompt_dist.errors import MachineError
from softprompt_dist.lifecycle import preflight as module
from softprompt_dist.lifecycle.preflight import RankFacts, describe_slow, preflight
from tests.messages import Said, assert_message

GPUS = [
    RankFacts("node0", "cuda:0", 0.002),
    RankFacts("node0", "cuda:1", 0.002),
    RankFacts("node1", "cuda:0", 0.0021),
    RankFacts("node1", "cuda:1", 0.002),
]
SLOW = RankFacts("node1", "cuda:1", 0.004)
BLIND = RankFacts("node1", "cuda:1", 0.002, sees_directory=False)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> list[RankFacts]:
    """What the ranks have found, in place of this one."""
    found: list[RankFacts] = []
    monkeypatch.setattr(module.ranks, "gather_objects", lambda own: found or [own])
    return found


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes))


def test_a_machine_that_is_well_says_nothing_in_less_than_a_second(
    tmp_path: Path, told: list[str]
) -> None:
    begun = time.perf_counter()
    preflight(tmp_path, 1000, told.append)
    assert time.perf_counter() - begun < 1
    assert told == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drill("D10")
def test_too_little_room_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    free(monkeypatch, 1_000_000)
    preflight(tmp_path, 1_000_000, told.append)
    begun = time.perf_counter()
    with pytest.raises(MachineError) as refused:
        preflight(tmp_path, 1_000_001, told.append)
    assert time.perf_counter() - begun < 1
    assert "1,000,000 bytes free" in str(refused.value)
    assert "1,000,001" in str(refused.value)
    assert "--run-dir" in str(refused.value)


def test_a_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module, "replace_file", denied)
    with pytest.raises(
        MachineError, match=r"cannot be written: .*Permission denied.*\. Pass --run-dir"
    ):
        preflight(tmp_path, 0, told.append)


def test_a_slow_device_is_named_and_the_run_goes_on(
    tmp_path: Path, told: list[str], of_other_ranks: list[RankFacts]
) -> None:
    of_other_ranks += [*GPUS[:3], SLOW]
    preflight(tmp_path, 0, told.append)
    assert len(told) == 1
    assert told[0].startswith("node1, cuda:1: a matrix product takes 2.0 times as long")


@pytest.mark.parametrize(
    "found",
    [
        GPUS,
        [RankFacts("node0", "cpu", 0.002), RankFacts("node0", "cpu", 0.2)],  # share the cores
        [RankFacts("node0", "cpu", 0.002)],
        [],
    ],
)
def test_what_is_alike_or_cannot_be_compared_is_not_named(found: list[RankFacts]) -> None:
    assert describe_slow(found) == []


def test_of_nodes_without_gpus_the_fastest_ranks_are_compared() -> None:
    found = [
        RankFacts(host, "cpu", seconds)
        for host, times in {"a": (2, 9), "b": (9, 2), "c": (7, 8)}.items()
        for seconds in times
    ]
    (sentence,) = describe_slow(found)
    assert sentence.startswith("c, cpu: a matrix product takes 3.5 times")


def test_a_node_that_does_not_see_the_directory_is_named(
    tmp_path: Path, told: list[str], of_other_ranks: list[RankFacts]
) -> None:
    of_other_ranks += [*GPUS[:3], BLIND]
    preflight(tmp_path, 0, told.append)
    assert len(told) == 1
    assert told[0].startswith(f"node1: {tmp_path} is not the directory that rank 0 (node0) writes")
    with pytest.raises(MachineError, match=r"on node1 .* to read the checkpoints\. Pass --run-dir"):
        preflight(tmp_path, 0, told.append, shared_for="to read the checkpoints")


def test_a_file_that_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(Path, "exists", lambda _: next(answers))
    preflight(tmp_path, 0, told.append)
    assert told == []


def test_the_doctor_tells_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_other_ranks: list[RankFacts]
) -> None:
    assert check_nodes(tmp_path) == [], "one rank has nobody to be compared with"
    assert check_devices(tmp_path) == []
    monkeypatch.setattr(module.ranks, "world_size", lambda: 4)
    monkeypatch.setattr(module.ranks, "broadcast_object", lambda value: value)
    of_other_ranks += GPUS
    assert [finding.status for finding in check_nodes(tmp_path / "run")] == ["ok", "ok"]
    of_other_ranks[3] = SLOW
    speed, sight = check_nodes(tmp_path / "run")
    assert (speed.status, sight.status) == ("warn", "ok")
    assert "node1, cuda:1" in speed.remedy
    assert check_devices(tmp_path) == [speed]
    of_other_ranks[3] = BLIND
    speed, sight = check_nodes(tmp_path / "run")
    assert (speed.status, sight.status) == ("ok", "warn")
    assert "node1" in sight.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drill("D10")
@pytest.mark.usefixtures("lone_process")
def test_tuning_is_refused_before_anything_is_loaded(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    from softprompt_dist import train
    from softprompt_dist.run import session

    monkeypatch.delenv("SOFTPROMPT_OUTCOME", raising=False)
    monkeypatch.setattr(session, "build_tuning_run", None)
    free(monkeypatch, 4096)
    outcome = said(train.main, "--recipe", tiny_recipe, "--run-dir", tmp_path / "run")
    assert_message(outcome, tmp_path / "run", "has 4,096 bytes free", "may have to write")
    assert (tmp_path / "run" / "why").read_text().startswith("error: ")
