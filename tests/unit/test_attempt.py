from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from softprompt_dist.errors import (
    ConfigError,
    DirectoryInUseError,
    HangError,
    NonFiniteLossError,
    StopFileError,
    StoppedError,
    SupersededError,
)
from softprompt_dist.lifecycle import attempt as attempt_module
from softprompt_dist.lifecycle import watchdog
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.outcome_files import FOLDER_VARIABLE, first_line, record_failure
from softprompt_dist.parallel import stop
from softprompt_dist.section import HealthConfig

HEALTH = HealthConfig(heartbeat_seconds=0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(attempt_module, "_LOOK_SECONDS", 0.0)


def begun(folder: Path) -> Attempt:
    return Attempt(folder, HEALTH, {"verb": "train", "steps": 30})


def beat(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "heartbeat.json").read_text())
    return found


def test_an_attempt_that_comes_to_its_end(tmp_path: Path) -> None:
    with begun(tmp_path) as attempt:
        assert first_line(attempt.files.why) == "running"
        assert watchdog.current()["limit_seconds"] == HEALTH.slow_timeout_seconds
        assert (
            beat(tmp_path)["token"] == json.loads((tmp_path / "attempt.json").read_text())["token"]
        )
        assert beat(tmp_path)["device"] == "cpu"
        attempt.note(step=7, loss=0.5)
        assert attempt.stop_wanted() == ""
        attempt.saved(7)
        attempt.finish(30)
    assert watchdog.current()["limit_seconds"] == 0, "nobody watches any more"
    assert first_line(attempt.files.done) == "30"
    assert first_line(attempt.files.why) == "done"
    assert first_line(attempt.files.step) == "7"
    last = beat(tmp_path)
    assert (last["step"], last["loss"], last["steps"], last["ended"]) == (7, 0.5, 30, True)
    assert not (tmp_path / "attempt.json").exists()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConfigError("steps is 0"), "fatal: steps is 0"),
        (NonFiniteLossError("nan"), "fatal: nan"),
        (StoppedError("SIGTERM after step 3, which is saved."), "signal: SIGTERM after step 3,"),
    ],
)
def test_an_error_is_told_and_the_directory_is_free(
    tmp_path: Path, error: ConfigError, why: str
) -> None:
    with pytest.raises(type(error)), begun(tmp_path):
        raise error
    assert first_line(tmp_path / "why").startswith(why)
    begun(tmp_path)


def test_a_bug_leaves_running_as_a_killed_process_does(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), begun(tmp_path):
        raise ZeroDivisionError
    assert first_line(tmp_path / "why") == "running"
    assert not (tmp_path / "attempt.json").exists()


def test_a_full_disk_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begun(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(attempt.files), "end", full)
    with pytest.raises(ConfigError, match="the cause"), attempt:
        raise ConfigError("the cause")
    assert not (tmp_path / "attempt.json").exists()


def test_signals_and_stop_files_end_it_at_the_next_boundary(tmp_path: Path) -> None:
    stop.listen()
    try:
        with begun(tmp_path) as attempt:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert attempt.stop_wanted() == "SIGUSR2"
            attempt.files.stop.touch()
            assert attempt.stop_wanted() == "STOP file"
            assert attempt.stop_wanted(failed=True) == "failure"
            error = attempt.stopped("STOP file", 15)
            assert (error.outcome, str(error)) == (
                "stop",
                "STOP file after step 15, which is saved.",
            )
            assert attempt.stopped("SIGUSR2", 15).outcome == "signal"
    finally:
        stop.forget()


def test_a_stop_file_keeps_it_from_beginning_and_nobody_owns_the_directory(tmp_path: Path) -> None:
    (tmp_path / "STOP").write_text("enough\n")
    with pytest.raises(StopFileError, match="enough"):
        begun(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"]


def test_a_second_attempt_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with begun(tmp_path) as attempt:
        with pytest.raises(DirectoryInUseError):
            begun(tmp_path)
        attempt.check_ours()
        assert attempt.stop_wanted() == ""


def test_who_was_superseded_publishes_nothing_and_does_not_speak(tmp_path: Path) -> None:
    path = tmp_path / "attempt.json"
    attempt = begun(tmp_path)
    with pytest.raises(SupersededError), attempt:
        taken_over(attempt)
    other = json.loads(path.read_text())
    assert other["token"] == "f" * 32
    assert (tmp_path / "why").read_text() == "running\n"
    assert not (tmp_path / "DONE").exists()
    assert (tmp_path / "heartbeat.json").read_text() == "the other's"


def taken_over(attempt: Attempt) -> None:
    folder = attempt.files.folder
    owner = json.loads((folder / "attempt.json").read_text())
    (folder / "attempt.json").write_text(json.dumps(owner | {"token": "f" * 32}))
    (folder / "heartbeat.json").write_text("the other's")
    (folder / "why").write_text("running\n")
    for publish in (attempt.check_ours, lambda: attempt.finish(30), attempt.stop_wanted):
        with pytest.raises(SupersededError, match="publishes nothing more"):
            publish()
    attempt.stop_wanted()


def test_what_befalls_a_superseded_attempt_is_not_told_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    owner = tmp_path / "attempt.json"
    attempt = begun(tmp_path)
    owner.write_text(json.dumps(json.loads(owner.read_text()) | {"token": "f" * 32}))
    with pytest.raises(ConfigError), attempt:
        raise ConfigError("step 15 is published already, with other tensors")
    record_failure(HangError("Rank 0 made no progress"))
    assert first_line(tmp_path / "why") == "running"
    owner.unlink()  # the other has left
    record_failure(HangError("Rank 0 made no progress"))
    assert first_line(tmp_path / "why") == "hang: Rank 0 made no progress"


def test_fresh_is_for_the_first_attempt_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm starts a job again with the command that it had."""

    def begins_anew(job: str, restart: int) -> bool:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        with Attempt(tmp_path, HealthConfig(), {}) as attempt:
            if attempt.begins_anew(True):
                attempt.begun_anew()
                return True
            assert not attempt.begins_anew(False)
            return False

    assert [begins_anew("41", restart) for restart in (0, 1, 2)] == [True, False, False]
    assert begins_anew("42", 0)
