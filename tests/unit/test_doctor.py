from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest

from softprompt_dist import doctor
from softprompt_dist.checks.finding import ChecksFailedError, Finding, table, verdict
from softprompt_dist.checks.world import World, world_to_check
from softprompt_dist.errors import ConfigError, MachineError

OK = Finding("memory", "ok", "much")
WARNED = Finding("disk", "warn", "slow", "Use another.")
FAILED = Finding("build lock", "fail", "stale", "Delete it.")
LAUNCHED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


def test_table_puts_the_remedy_below_its_finding() -> None:
    text = table([OK, dataclasses.replace(WARNED, remedy="Use another.\nOr wait.")])
    assert [line.split() for line in text.splitlines()] == [
        ["ok", "memory", "much"],
        ["warn", "disk", "slow"],
        ["->", "Use", "another."],
        ["Or", "wait."],
    ]


def test_verdict_counts_warnings_and_names_what_failed() -> None:
    assert verdict([OK]) == "No check failed; no warnings."
    assert verdict([OK, WARNED]) == "No check failed; 1 warning."
    with pytest.raises(ChecksFailedError, match=r"^1 check failed \(build lock\)") as error:
        verdict([OK, FAILED, FAILED, WARNED])
    assert error.value.exit_code == 1


@pytest.fixture
def run_doctor(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lone_process: None,
) -> Callable[..., str]:
    """`run_doctor(findings of the machine, *arguments)`: what it prints; nothing is measured."""
    monkeypatch.setattr(doctor, "disk_findings", lambda job, world: [])

    def run(machine: list[Finding], *arguments: str) -> str:
        monkeypatch.setattr(doctor, "machine_findings", lambda job, world: machine)
        doctor.main(list(arguments))
        return capsys.readouterr().out

    return run


def test_warnings_do_not_fail_and_failures_do(run_doctor: Callable[..., str]) -> None:
    said = run_doctor([OK, WARNED])
    assert "warn  disk" in said
    assert "communication" in said
    assert said.endswith("warning.\n")
    with pytest.raises(ChecksFailedError, match="build lock"):
        run_doctor([OK, FAILED])


def test_without_the_libraries_nothing_else_is_tried(
    run_doctor: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = Finding("torch", "fail", "not installed", "Install it.")
    monkeypatch.setattr(doctor, "check_versions", lambda: [missing])
    with pytest.raises(ChecksFailedError, match="torch"):
        run_doctor([FAILED])
    said = capsys.readouterr().out
    assert "-> Install it." in said
    assert "build lock" not in said


def test_ranks_of_its_own_are_started_and_judged(
    run_doctor: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def fake(num_ranks: int, *, timeout_seconds: float, debug: bool) -> list[Finding]:
        started.append((num_ranks, timeout_seconds))
        return [Finding("communication", "fail", "3 local ranks", "Rank 1 was killed.")]

    monkeypatch.setattr("softprompt_dist.checks.local_ranks.check_local_communication", fake)
    with pytest.raises(ChecksFailedError, match="communication"):
        run_doctor([OK], "--ranks", "3", "--timeout", "7")
    assert started == [(3, 7.0)]


def test_a_recipe_that_cannot_be_read_is_a_finding(run_doctor: Callable[..., str]) -> None:
    with pytest.raises(ChecksFailedError, match="recipe"):
        run_doctor([OK], "--recipe", "dmeo")


def test_problems_of_other_machines_are_told_with_their_name() -> None:
    nodes = [("n1", [OK, WARNED]), ("n1", []), ("n2", [OK, FAILED])]
    (found,) = doctor._problems_elsewhere(nodes)
    assert found == dataclasses.replace(FAILED, name="build lock on n2")


def test_the_world_is_the_launcher_s_or_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LAUNCHED, "SLURM_PROCID", "SLURM_NTASKS"]:
        monkeypatch.delenv(name, raising=False)
    environ = dict(os.environ)
    assert world_to_check(None, environ) == World(1, 1, launched=False)
    assert world_to_check(3, environ) == World(3, 3, launched=False)
    world = world_to_check(None, environ | LAUNCHED)
    assert world == World(4, 2, launched=True, local_rank=1)
    assert (world.cluster.gpus_per_node, world.cluster.nodes) == (2, 2)
    assert not world.looks_at_machine
    assert "RANK" not in environ, "joining fills them in, looking does not"


def test_a_world_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks is 0"):
        world_to_check(0, {})
    with pytest.raises(ConfigError, match="--ranks is 2, but a launcher has started 4"):
        world_to_check(2, LAUNCHED)
    with pytest.raises(MachineError, match="without MASTER_PORT"):
        world_to_check(None, {k: v for k, v in LAUNCHED.items() if k != "MASTER_PORT"})
