import errno
import json
import sys
import time
from pathlib import Path

import pytest

from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.run import display
from softprompt_dist.run import journal as journal_module
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.metrics_file import MetricsFile, read_metrics


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(display, "monotonic", lambda: self.now)


def log_steps(journal, first, last, factor=1.0):
    for step in range(first, last + 1):
        journal.log(step, {"loss": factor / step, "num_tokens": 64})
        if step % 2 == 0:
            journal.log(step, {"accuracy": step / 10}, kind="validation")


def without_time(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("time") > 1e9 for line in lines)
    return lines


def test_lines_have_step_kind_time_and_metrics(directory):
    with Journal(directory, total_steps=2) as journal:
        log_steps(journal, 1, 2)
    assert without_time(directory.metrics) == [
        {"step": 1, "kind": "train", "loss": 1.0, "num_tokens": 64.0},
        {"step": 2, "kind": "train", "loss": 0.5, "num_tokens": 64.0},
        {"step": 2, "kind": "validation", "accuracy": 0.2},
    ]


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    whole, resumed = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "resumed")
    for run in (whole, resumed):
        run.create()
    with Journal(whole, total_steps=8) as journal:
        log_steps(journal, 1, 8)
    with Journal(resumed, total_steps=8) as journal:
        log_steps(journal, 1, 4)
        log_steps(journal, 5, 7, factor=-9.0)  # after the checkpoint at step 4, lost by a kill
    with resumed.metrics.open("a") as file:
        file.write('{"step": 3, "ki')
    with Journal(resumed, total_steps=8, start_step=4) as journal:
        log_steps(journal, 5, 8)
    assert without_time(resumed.metrics) == without_time(whole.metrics)


def test_a_score_logged_again_after_the_resume_takes_the_place_of_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).append(4, "test", {"accuracy": 0.1})
    resumed = MetricsFile(path, 4)
    resumed.append(4, "test", {"accuracy": 0.2})
    assert [line["accuracy"] for line in read_metrics(path)] == [0.2]


def test_a_start_at_step_0_begins_a_new_file(directory):
    with Journal(directory, total_steps=2) as journal:
        journal.log(0, {"accuracy": 0.5}, kind="validation")
    with Journal(directory, total_steps=2) as journal:
        log_steps(journal, 1, 1)
    assert [line["kind"] for line in read_metrics(directory.metrics)] == ["train"]


def test_tensorboard_shows_every_step_once_after_a_resume(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Journal(directory, total_steps=6) as journal:
        log_steps(journal, 1, 5, factor=-9.0)
    # Of two files of one second the later one's name may be the lower: ".10" is before ".9".
    (file,) = directory.tensorboard.iterdir()
    file.rename(file.with_name(f"events.out.tfevents.{int(time.time()):010d}.zzz"))
    with Journal(directory, total_steps=6, start_step=3) as journal:
        log_steps(journal, 4, 6)
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[4].value == pytest.approx(1 / 5)
    assert "validation/accuracy" in events.Tags()["scalars"]


def test_plain_lines_come_every_few_seconds_with_the_time_left(directory, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Journal(directory, total_steps=100) as journal:
        journal.say("hello")
        clock.now += 60  # scoring the untuned prompt is no step
        for step in range(1, 101):
            clock.now += 1
            journal.log(step, {"loss": 0.25})
            if step == 50:
                journal.log(step, {"accuracy": 0.5}, kind="validation")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "hello",
        "step   1/100  train  loss 0.25  ETA ?",
        "step   6/100  train  loss 0.25  ETA 0:01:34",
    ]
    assert "step  50/100  validation  accuracy 0.5" in lines
    assert lines[-1] == "step 100/100  train  loss 0.25  ETA 0:00:00"
    assert len(lines) == 1 + 20 + 1 + 1


SHOWN = {"loss": ".4g", "tokens_per_second": ",.0f", "mfu": ".1f"}
LONG = {"loss": 2.0, "learning_rate": 0.001, "mfu": 41.234, "tokens_per_second": 131072.4}


def test_lines_of_a_long_step_show_what_was_chosen_and_the_file_has_all(directory, capsys):
    with Journal(directory, total_steps=9, shown=SHOWN) as journal:
        journal.log(1, LONG)
        journal.log(1, {"prefix_lm_nll": 2.5, "sentinel_leak": 96.0}, kind="validation")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/9  train  loss 2  tokens_per_second 131,072  mfu 41.2  ETA ?",
        "step 1/9  validation  prefix_lm_nll 2.5  sentinel_leak 96",
    ]
    assert read_metrics(directory.metrics)[0].items() >= LONG.items()


def test_a_bar_shows_what_was_chosen_of_a_long_step(directory, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Journal(directory, total_steps=1, shown=SHOWN) as journal:
        journal.log(1, {"loss": 2.0, "learning_rate": 0.001, "mfu": 41.234})
    shown = capsys.readouterr().err
    assert "loss 2  mfu 41.2" in shown
    assert "learning_rate" not in shown


def test_the_time_left_of_a_resumed_run_counts_only_its_own_steps(directory, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Journal(directory, total_steps=100, start_step=80) as journal:
        for step in (81, 82):
            clock.now += 10
            journal.log(step, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 0:03:00")


def test_a_terminal_gets_a_bar_and_whole_lines_above_it(directory, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Journal(directory, total_steps=4) as journal:
        log_steps(journal, 1, 4)
        journal.say("done")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "step 2/4  validation accuracy 0.2",
        "step 4/4  validation accuracy 0.4",
        "done",
    ]
    assert "4/4" in captured.err
    assert "loss 0.25" in captured.err


def test_other_ranks_write_and_print_nothing(directory, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    with Journal(directory, total_steps=2) as journal:
        log_steps(journal, 1, 2)
        journal.say("nothing")
    assert list(directory.path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_file_that_cannot_be_written_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="--run-dir"):
        Journal(RunDirectory(tmp_path / "file"), total_steps=1)


def test_a_disk_that_fills_up_is_said_once_and_does_not_stop_the_run(
    directory, monkeypatch, caplog
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with Journal(directory, total_steps=3) as journal:
        monkeypatch.setattr(MetricsFile, "append", full)
        log_steps(journal, 1, 3)
    assert [record.message for record in caplog.records] == [
        "Journal: the metrics of step 1 cannot be written yet: [Errno 28] No space left on device"
    ]


def test_what_a_busy_disk_did_not_take_is_written_later(directory, monkeypatch, caplog):
    real, calls = Path.open, iter(range(100))

    def busy(path, mode="r", **settings):
        is_away = mode == "a" and next(calls) % 3
        if is_away:
            with real(path, mode, **settings) as file:
                file.write('{"step": 1, "ki')
        if is_away or mode == "x":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, mode, **settings)

    with Journal(directory, total_steps=8) as journal:
        writer = journal._events
        monkeypatch.setattr(Path, "open", busy)
        monkeypatch.setattr(journal_module, "_SECONDS_WITHOUT_EVENTS", 0.0)
        monkeypatch.setattr(writer, "add_scalar", lambda *_: busy(directory.path / "events", "x"))
        log_steps(journal, 1, 8)
        monkeypatch.undo()  # nothing more is logged: the last line is written at the end
    written = [(line["step"], line["kind"][:5]) for line in without_time(directory.metrics)]
    assert [step for step, kind in written if kind == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, kind in written if kind == "valid"] == [2, 4, 6, 8]
    assert len(caplog.records) == 1, "said once"
    assert journal._events is not writer, "TensorBoard's writer is dead after an error"
