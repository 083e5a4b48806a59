from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from softprompt_dist import durable, outcome_files
from softprompt_dist.errors import (
    CheckpointError,
    ConfigError,
    DirectoryInUseError,
    HangError,
    MachineError,
    StopFileError,
    StoppedError,
    SupersededError,
)
from softprompt_dist.outcome_files import (
    FOLDER_VARIABLE,
    OutcomeFiles,
    announce,
    first_line,
    record_failure,
    silent_where,
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OutcomeFiles:
    """Those of a run directory that the batch script has named."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    silent_where(lambda: False)
    return OutcomeFiles(tmp_path)


def test_a_run_from_its_beginning_to_its_end(files: OutcomeFiles) -> None:
    files.begin()
    assert first_line(files.why) == "running"
    assert not files.done.exists()
    assert files.published_step() == 0
    files.publish_step(20)
    assert first_line(files.step) == "20"
    files.finish(30)
    assert (first_line(files.done), first_line(files.why)) == ("30", "done")
    files.begin()
    assert files.done.exists(), "what is asked for now may not belong to this run"
    files.begin_again()
    assert not files.done.exists(), "it is done again only when it has come to its end again"


def test_a_stop_file_is_obeyed_and_quoted(files: OutcomeFiles) -> None:
    files.stop.write_text("three attempts without progress\n")
    with pytest.raises(StopFileError, match=r"three attempts without progress\. Remove the file"):
        files.begin()
    assert not files.why.exists()
    files.stop.write_text("")
    with pytest.raises(StopFileError, match="no reason given"):
        files.refuse_if_stopped()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ConfigError("steps is 0"), "fatal: steps is 0"),
        (MachineError("port 1 is in use"), "error: port 1 is in use"),
        (HangError("rank 1"), "hang: rank 1"),
        (StoppedError("SIGTERM after step 15"), "signal: SIGTERM after step 15"),
        (StopFileError("STOP"), "stop: STOP"),
        (ConfigError("two\nlines"), "fatal: two lines"),
    ],
)
def test_a_failure_is_one_line_of_its_kind(
    files: OutcomeFiles, failure: ConfigError, said: str
) -> None:
    files.begin()
    record_failure(failure)
    assert files.why.read_text() == f"{said}\n"


@pytest.mark.parametrize("failure", [DirectoryInUseError("busy"), SupersededError("gone")])
def test_what_is_anothers_is_left_alone(files: OutcomeFiles, failure: ConfigError) -> None:
    files.begin()
    record_failure(failure)
    assert first_line(files.why) == "running"


def test_the_first_to_speak_is_believed(files: OutcomeFiles) -> None:
    files.begin()
    record_failure(ConfigError("the cause"))
    record_failure(MachineError("another rank has ended"))
    assert first_line(files.why) == "fatal: the cause"


def test_a_superseded_attempt_says_nothing(files: OutcomeFiles) -> None:
    files.begin()
    silent_where(lambda: True)
    record_failure(HangError("rank 0 woke up"))
    assert first_line(files.why) == "running"


def test_the_end_of_an_earlier_attempt_is_not_taken_for_this_ones(files: OutcomeFiles) -> None:
    files.end("signal: SIGTERM after step 15")
    files.forget_earlier_attempts()
    assert first_line(files.why) == "signal: SIGTERM after step 15", "said since this one began"
    os.utime(files.why, (1.0, 1.0))
    files.forget_earlier_attempts()
    assert first_line(files.why) == "running"


def test_a_failure_before_the_directory_is_known_goes_where_the_script_waits(
    files: OutcomeFiles, tmp_path: Path
) -> None:
    announce(tmp_path / "other")
    record_failure(ConfigError("no such key"))
    assert first_line(files.why) == "fatal: no such key"
    assert not (tmp_path / "other").exists()


def test_without_a_run_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record_failure(ConfigError("no such verb"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_hides_no_failure(
    files: OutcomeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome_files, "replace_file", full)
    record_failure(ConfigError("the cause"))
    assert not files.why.exists(), "nothing half-written"


def test_lost_checkpoints_are_no_new_run(files: OutcomeFiles) -> None:
    files.check_resumed(0)
    files.publish_step(20)
    files.check_resumed(20)
    with pytest.raises(CheckpointError, match=r"step 20 was saved, but no checkpoint .* --fresh"):
        files.check_resumed(0)
    files.check_resumed(10)
    assert files.published_step() == 10
    files.begin_anew()
    files.check_resumed(0)


def test_what_cannot_be_read_is_not_taken_for_what_is_not_there(
    files: OutcomeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a job that is queued again would set aside what its own attempts have saved."""
    files.publish_step(20)
    files.begin_anew("41")
    files.publish_step(20)
    real, left = Path.read_text, 3

    def away(path: Path, *given: str, **named: str) -> str:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(durable, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(Path, "read_text", away)
    assert files.has_begun_anew("41")
    left = 3
    assert files.published_step() == 20
    left = 10_000
    monkeypatch.setattr(durable, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(OSError, match="Stale"):
        files.check_resumed(0)


@pytest.mark.parametrize("content", [b"", b"-3\n", b"3.5\n", b"\xff\xfe\n"])
def test_a_step_that_is_no_number_is_none(files: OutcomeFiles, content: bytes) -> None:
    files.step.write_bytes(content)
    assert files.published_step() == 0
