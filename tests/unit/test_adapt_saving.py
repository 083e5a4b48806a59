"""Checkpoints written in the background: what they hold, who waits for them, how they fail."""

import re
import threading
from pathlib import Path

import pytest

from softprompt_dist.adaptation import checkpoint, session, sharded_files
from softprompt_dist.adaptation import run as adaptation_run
from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
from softprompt_dist.errors import CheckpointError, NonFiniteLossError, SupersededError
from softprompt_dist.lifecycle import attempt
from softprompt_dist.lifecycle.ownership import ATTEMPT
from tests import adaptations
from tests.adaptations import assert_same
from tests.damage import disk_full, names

pytestmark = pytest.mark.usefixtures("world_of_adaptations")

STEPS = ["step-00000002", "step-00000004"]


def saved(config):
    return names(Path(config.run_directory) / "checkpoints")


@pytest.fixture
def when_step(monkeypatch):
    """`when_step(number, act)`: what happens once that update is made."""
    update, acts = adaptation_run.AdaptationRun.update, {}

    def updated(run, *arguments):
        metrics = update(run, *arguments)
        acts.pop(run.step, lambda: None)()
        return metrics

    monkeypatch.setattr(adaptation_run.AdaptationRun, "update", updated)
    return acts.__setitem__


@pytest.fixture
def slow_disk(monkeypatch):
    """The first save in the background waits for this event with its first byte."""
    write, let_go, first = sharded_files._gathered_chunks, threading.Event(), []

    def waiting(*arguments):
        if threading.current_thread() is not threading.main_thread() and not first:
            first.append(True)
            assert let_go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(sharded_files, "_gathered_chunks", waiting)
    return let_go


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adafactor", "dropout": 0.1},
        {"optimizer": "adamw", "engine": {"zero_stage": 2, "offload_optimizer": "cpu"}},
        {"engine": {"zero_stage": 3}, "dtype": "bf16"},
    ],
    ids=str,
)
def test_a_checkpoint_is_of_its_step_whenever_it_is_written(
    make_config, slow_disk, when_step, settings
):
    when_step(4, slow_disk.set)  # weights and random state have gone on by two updates
    beside = make_config("beside", **settings)
    session.adapt(beside)
    foreground = {"every_steps": 2, "keep_last": 2, "background": False}
    plain = make_config("plain", checkpoint=foreground, **settings)
    session.adapt(plain)
    assert saved(beside) == saved(plain) == STEPS
    for step in (2, 4):
        ours, theirs = (adaptations.checkpoint(c.run_directory, step) for c in (beside, plain))
        for name in ("model.safetensors", "small.safetensors", "rng.safetensors"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (step, name)
        states = [adaptations.checkpoint_state(c.run_directory, step) for c in (beside, plain)]
        assert states[0] == states[1]


def test_a_save_waits_for_the_one_before_and_says_so_once(
    make_config, slow_disk, monkeypatch, capfd
):
    wait = session.CheckpointSaver._wait_for_the_one_before
    seen = []

    def waiting(saver, step):
        seen.append((step, saved(config)))
        threading.Timer(0.3, slow_disk.set).start()
        wait(saver, step)
        seen.append((step, saved(config)))

    monkeypatch.setattr(session.CheckpointSaver, "_wait_for_the_one_before", waiting)
    config = make_config(checkpoint={"every_steps": 1, "keep_last": 9})
    session.adapt(config)
    before, after = seen[2:4]
    assert before[0] == after[0] == 2
    assert [name for name in before[1] if name.startswith("step-")] == []
    assert after[1] == ["step-00000001"]
    told = re.findall(
        r"waited ([\d.]+) s at step 2 until the checkpoint of step 1", capfd.readouterr().out
    )
    assert [float(seconds) >= 0.2 for seconds in told] == [True]
    assert saved(config) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]


@pytest.mark.drill("D21")
def test_a_failure_is_heard_at_the_next_step_and_older_checkpoints_stay(
    make_config, slow_disk, when_step, monkeypatch
):
    config = make_config(steps=9, checkpoint={"every_steps": 3, "keep_last": 9})
    slow_disk.set()
    updates = []

    def fill_the_disk():
        monkeypatch.setattr(sharded_files, "_write_files", disk_full)

    def until_it_has_failed():
        updates.append(7)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)

    when_step(5, fill_the_disk)
    when_step(7, until_it_has_failed)
    when_step(8, lambda: updates.append(8))
    with pytest.raises(CheckpointError, match="step-00000006 could not be written: No space left"):
        session.adapt(config)
    assert updates == [7]
    assert saved(config) == ["step-00000003"]
    folder = Path(config.run_directory)
    assert (folder / "step").read_text() == "3\n"
    assert (folder / "why").read_text().startswith("fatal: ")
    monkeypatch.undo()
    adaptations.make_quick(monkeypatch, folder.parent / "cache")
    session.adapt(config)
    assert (folder / "DONE").read_text() == "9\n"


def test_a_failure_of_the_last_save_is_not_lost(make_config, slow_disk, when_step, monkeypatch):
    """What a background save has met is raised by whatever comes next, here the last save."""
    config = make_config(steps=3, checkpoint={"every_steps": 2})

    def fail_while_step_3_is_saved():
        monkeypatch.setattr(sharded_files, "_write_files", disk_full)
        slow_disk.set()

    when_step(3, fail_while_step_3_is_saved)
    with pytest.raises(CheckpointError, match="step-00000002 could not be written"):
        session.adapt(config)
    assert saved(config) == []
    assert not (Path(config.run_directory) / "export").exists()


@pytest.mark.drill("D22")
def test_an_attempt_that_was_superseded_publishes_nothing(
    make_config, slow_disk, when_step, monkeypatch
):
    """A later attempt takes the directory over while the earlier one's writer is at it."""
    config = make_config(checkpoint={"every_steps": 1, "keep_last": 9})
    monkeypatch.setattr(attempt, "_LOOK_SECONDS", 0.0)
    file = Path(config.run_directory) / ATTEMPT

    def take_over():
        file.write_text(file.read_text().replace('"token": "', '"token": "another-'))
        slow_disk.set()

    when_step(2, take_over)
    with pytest.raises(SupersededError, match="was taken over"):
        session.adapt(config)
    assert saved(config) == []
    assert not (Path(config.run_directory) / "step").exists()
    assert "another-" in file.read_text()


def test_a_loss_that_is_not_finite_waits_for_the_writer(make_config, slow_disk, monkeypatch):
    update = adaptation_run.AdaptationRun.update

    def infinite(run, *arguments):
        if run.step == 2:
            slow_disk.set()
            raise NonFiniteLossError("Step 3: the loss is nan.")
        return update(run, *arguments)

    monkeypatch.setattr(adaptation_run.AdaptationRun, "update", infinite)
    config = make_config()
    with pytest.raises(NonFiniteLossError, match="The state after step 2 is saved"):
        session.adapt(config)
    assert saved(config) == STEPS[:1]


def test_a_full_disk_does_not_hide_a_loss_that_is_not_finite(make_config, slow_disk, monkeypatch):
    def infinite(run, *arguments):
        slow_disk.set()
        monkeypatch.setattr(sharded_files, "_write_files", disk_full)
        raise NonFiniteLossError("Step 1: the loss is nan.")

    monkeypatch.setattr(adaptation_run.AdaptationRun, "update", infinite)
    config = make_config()
    said = "the loss is nan. The state after step 0 could not be saved: .*No space left"
    with pytest.raises(NonFiniteLossError, match=said):
        session.adapt(config)
    assert "nan" in (Path(config.run_directory) / "why").read_text()


def test_the_export_waits_for_the_checkpoint_of_its_step(make_config, monkeypatch):
    """Or a kill between them would leave an export of a step that the resume trains anew."""
    config = make_config(export={"steps": [2]})
    published, exported = checkpoint.CheckpointFolder.publish, []

    def publish(*arguments):
        exported.append((Path(config.run_directory) / "export-step-00000002").exists())
        published(*arguments)

    monkeypatch.setattr(checkpoint.CheckpointFolder, "publish", publish)
    save, threads = AdaptationCheckpointStore.save, []

    def saving(*arguments):
        threads.append(threading.current_thread() is threading.main_thread())
        save(*arguments)

    monkeypatch.setattr(AdaptationCheckpointStore, "save", saving)
    session.adapt(config)
    assert exported == [False, True]
    assert threads == [True, True]


def test_without_the_background_no_copy_is_made(make_config, monkeypatch):
    monkeypatch.setattr(
        "softprompt_dist.adaptation.saving.HostCopy.of", lambda *_: pytest.fail("copied")
    )
    config = make_config(checkpoint={"every_steps": 1, "keep_last": 9, "background": False})
    session.adapt(config)
    assert len(saved(config)) == 4
    expected = make_config("expected", checkpoint={"every_steps": 9, "background": False})
    session.adapt(expected)
    ours, theirs = (adaptations.exported(c.run_directory) for c in (config, expected))
    assert_same(ours, theirs)


def test_where_gloo_cannot_connect_saves_are_made_in_the_foreground(
    make_config, monkeypatch, caplog
):
    def no_network():
        monkeypatch.setattr(session, "_load", loaded)
        return "rank 1 on n2: no route"

    load, order = session._load, []
    early = "loaded before it was tried"
    monkeypatch.setattr(session, "_load", lambda *_, **__: pytest.fail(early))
    monkeypatch.setattr(session, "cpu_group_problem", no_network)

    def loaded(*given, **named):
        order.append(caplog.text)
        return load(*given, **named)

    monkeypatch.setattr(
        "softprompt_dist.adaptation.saving.HostCopy.of", lambda *_: pytest.fail("copied")
    )
    config = make_config(checkpoint={"every_steps": 2, "keep_last": 2, "background": True})
    session.adapt(config)
    assert saved(config) == STEPS
    assert "rank 1 on n2: no route" in order[0]
    assert "GLOO_SOCKET_IFNAME" in order[0]
