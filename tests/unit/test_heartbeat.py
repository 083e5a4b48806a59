from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from softprompt_dist.lifecycle import heartbeat as module
from softprompt_dist.lifecycle.heartbeat import Heartbeat
from softprompt_dist.lifecycle.watchdog import doing


def read(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "heartbeat.json").read_text())
    return found


def until_beat(folder: Path, **expected: object) -> dict[str, object]:
    deadline = time.monotonic() + 10
    while not expected.items() <= (found := read(folder)).items():
        assert time.monotonic() < deadline, found
        time.sleep(0.005)
    return found


def test_it_beats_while_the_main_thread_waits_and_says_what_for(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0.01, {"host": "node1", "steps": 30})
    heart.start()
    first = read(tmp_path)
    assert (first["host"], first["steps"], first["heartbeat_seconds"]) == ("node1", 30, 0.01)
    with doing("loading", 60.0):
        found = until_beat(tmp_path, doing="loading", limit_seconds=60.0)
    assert found["time"] > first["time"]  # type: ignore[operator]
    heart.note(step=3, loss=0.25)
    found = until_beat(tmp_path, step=3, loss=0.25)
    assert abs(time.time() - float(str(found["step_time"]))) < 10
    heart.note(loss=0.125)
    assert until_beat(tmp_path, loss=0.125)["step"] == 3
    heart.stop(last_beat=True)
    last = read(tmp_path)
    assert last["ended"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_without_a_last_beat_the_file_stays_as_it_was(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 60.0, {})
    heart.start()
    (tmp_path / "heartbeat.json").write_text("another's")
    heart.stop(last_beat=False)
    assert (tmp_path / "heartbeat.json").read_text() == "another's"


def test_where_another_attempts_heart_beats_it_is_still(tmp_path: Path) -> None:
    is_ours = True
    heart = Heartbeat(tmp_path, 0.01, {}, lambda: is_ours)
    heart.start()
    is_ours = False
    path = tmp_path / "heartbeat.json"
    path.write_text("another's")
    time.sleep(0.1)  # several beats, had it not stopped
    heart.stop(last_beat=True)
    assert path.read_text() == "another's"


def test_a_full_disk_is_said_once_and_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[object] = []

    def full(*given: object, **_: object) -> None:
        calls.append(given)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "replace_file", full)
    heart = Heartbeat(tmp_path, 0.001, {})
    with caplog.at_level(logging.WARNING):
        heart.start()
        deadline = time.monotonic() + 10
        while len(calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        heart.stop(last_beat=True)
    assert len(calls) >= 5
    assert caplog.text.count("No heartbeat can be written") == 1
