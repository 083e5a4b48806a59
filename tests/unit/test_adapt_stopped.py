"""Adaptations that are asked to end, in every phase: by a signal, or by a STOP file."""

import shutil
import signal
from pathlib import Path

import pytest

from softprompt_dist import adapt
from softprompt_dist.adaptation import checkpoint, export, measures, session, sharded_files
from softprompt_dist.adaptation import run as adaptation_run
from softprompt_dist.data.lm import encoding_pool
from softprompt_dist.errors import CheckpointError, StopFileError, StoppedError
from softprompt_dist.parallel import polling, stop
from tests import adaptations, runs
from tests.adaptations import assert_same
from tests.damage import names

pytestmark = pytest.mark.usefixtures("world_of_adaptations", "listening")


def files_of(config):
    folder = Path(config.run_directory)
    return {
        name: (folder / name).read_text().strip() if (folder / name).exists() else None
        for name in ("DONE", "why", "step")
    }


def saved_steps(config):
    return [name for name in names(Path(config.run_directory) / "checkpoints") if "step-" in name]


def goes_on(config):
    """What the same command does in a process of its own."""
    stop.forget()
    stop.listen()
    session.adapt(config)


def assert_as_undisturbed(config, make_config, **settings):
    """Weights, curves and outcome of a run that was stopped and has been continued."""
    whole = make_config("undisturbed", **settings)
    session.adapt(whole)
    ours, theirs = Path(config.run_directory), Path(whole.run_directory)
    assert_same(adaptations.exported(ours), adaptations.exported(theirs))
    assert curves(ours) == curves(theirs)
    assert files_of(config) == files_of(whole) == {"DONE": "4", "why": "done", "step": "4"}


def curves(run_dir):
    timed = ("tokens_per_second", "tflops_per_second", "mfu", "seconds_left")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in runs.metrics_without_time(run_dir)
    ]


@pytest.mark.parametrize(
    ("place", "name", "doing"),
    [
        (adaptation_run, "find_source", "looking at the model"),
        (adaptation_run, "verify_folders", "reading the text"),
        (adaptation_run, "AdaptationEngine", "making the engine"),
        (session, "start", "reading the weights"),
    ],
)
def test_while_loading_nothing_is_begun(make_config, signalled_in, place, name, doing):
    signalled_in(place, name)
    config = make_config()
    with pytest.raises(StoppedError, match=f"SIGUSR1 while {doing}") as stopped:
        session.adapt(config)
    assert stopped.value.exit_code == 0
    assert files_of(config)["why"].startswith(f"signal: SIGUSR1 while {doing}")
    assert (files_of(config)["DONE"], files_of(config)["step"]) == (None, None)
    assert saved_steps(config) == []
    goes_on(config)
    assert files_of(config)["DONE"] == "4"


def test_tokenising_ends_at_once_and_leaves_nothing_half_made(
    make_config, signalled_in, monkeypatch, tmp_path
):
    monkeypatch.setattr(polling, "_SECONDS", 0.0)
    signalled_in(encoding_pool, "encode_rows")
    config = make_config()
    with pytest.raises(StoppedError, match="SIGUSR1 while tokenising the text"):
        session.adapt(config)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"] == [
        tmp_path / "cache" / "corpora"
    ]
    goes_on(config)
    assert files_of(config)["DONE"] == "4"


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_in_training_the_update_ends_and_is_saved(make_config, signalled_in, number):
    signalled_in(adaptation_run.AdaptationRun, "update", call=3, number=number)
    config = make_config(checkpoint={"every_steps": 100})
    with pytest.raises(StoppedError):
        session.adapt(config)
    name = signal.Signals(number).name
    assert files_of(config) == {
        "DONE": None, "why": f"signal: {name} after step 3, which is saved.", "step": "3"
    }  # fmt: skip
    assert saved_steps(config) == ["step-00000003"]
    assert not (Path(config.run_directory) / "export").exists()
    goes_on(config)
    assert_as_undisturbed(config, make_config)


def test_a_measurement_that_was_cut_is_made_by_the_resume(make_config, signalled_in):
    settings = {
        "validation_corpus": make_config().corpus,
        "evaluation": {"max_examples": 13, "every_steps": 2},
        "checkpoint": {"every_steps": 100},
    }
    # Once a measurement, the last of its parts: the second is that of step 2.
    signalled_in(measures, "_summed_leaks", call=2)
    config = make_config(**settings)
    with pytest.raises(StoppedError, match="after step 2, which is saved"):
        session.adapt(config)
    measured = [line["step"] for line in curves(Path(config.run_directory)) if "z_loss" in line]
    assert measured == [0, 1, 2], "the last of them is the update's line"
    goes_on(config)
    assert_as_undisturbed(config, make_config, **settings)


def test_the_untrained_model_is_measured_anew(make_config, signalled_in):
    settings = {"validation_corpus": make_config().corpus}
    signalled_in(measures, "_summed_losses")
    config = make_config(**settings)
    with pytest.raises(StoppedError, match="SIGUSR1 while measuring the untrained model"):
        session.adapt(config)
    assert saved_steps(config) == []
    goes_on(config)
    assert_as_undisturbed(config, make_config, **settings)


@pytest.mark.parametrize("call", [1, 5])
def test_an_export_that_was_cut_leaves_nothing_and_is_made_by_the_resume(
    make_config, signalled_in, monkeypatch, call
):
    monkeypatch.setattr(sharded_files, "CHUNK_BYTES", 20_000)
    config = make_config(checkpoint={"every_steps": 100, "background": False})
    # A checkpoint has the moments, too: what is counted are the chunks of the export behind it.
    written = export.write_tensors

    def interrupted(*arguments, **settings):
        signalled_in(sharded_files, "_gathered", call=call)
        return written(*arguments, **settings)

    monkeypatch.setattr(export, "write_tensors", interrupted)
    with pytest.raises(StoppedError, match="SIGUSR1 after step 4, which is saved"):
        session.adapt(config)
    folder = Path(config.run_directory)
    assert [name for name in names(folder) if "export" in name] == []
    assert files_of(config)["DONE"] is None
    monkeypatch.undo()
    adaptations.make_quick(monkeypatch, folder.parent / "cache")
    goes_on(config)
    assert_as_undisturbed(config, make_config)


def test_a_signal_during_a_save_in_the_foreground_costs_no_second_save(make_config, signalled_in):
    signalled_in(checkpoint, "encode_manifest")
    config = make_config(checkpoint={"every_steps": 2, "background": False})
    with pytest.raises(StoppedError, match="after step 2, which is saved"):
        session.adapt(config)
    assert saved_steps(config) == ["step-00000002"]
    goes_on(config)
    assert_as_undisturbed(config, make_config)


def test_while_a_checkpoint_is_written_training_ends_at_the_next_step(make_config, signalled_in):
    signalled_in(checkpoint, "encode_manifest")  # in the writer's thread
    config = make_config()
    with pytest.raises(StoppedError):
        session.adapt(config)
    step = int(files_of(config)["step"])
    assert step in (3, 4)  # the writer of step 2 is not waited for
    assert saved_steps(config) == ["step-00000002", f"step-0000000{step}"]
    goes_on(config)
    assert_as_undisturbed(config, make_config)


def test_a_stop_file_ends_a_run_and_keeps_it_from_going_on(make_config, monkeypatch):
    config = make_config(checkpoint={"every_steps": 100})
    update, file = adaptation_run.AdaptationRun.update, Path(config.run_directory) / "STOP"
    monkeypatch.setattr("softprompt_dist.lifecycle.attempt._LOOK_SECONDS", 0.0)

    def stopped_by_a_user(run, *arguments):
        if run.step == 1:
            file.write_text("enough\n")
        return update(run, *arguments)

    monkeypatch.setattr(adaptation_run.AdaptationRun, "update", stopped_by_a_user)
    with pytest.raises(StoppedError):
        session.adapt(config)
    assert files_of(config)["why"] == "stop: STOP file after step 2, which is saved."
    with pytest.raises(StopFileError, match="enough"):
        session.adapt(config)
    file.unlink()
    monkeypatch.setattr(adaptation_run.AdaptationRun, "update", update)
    session.adapt(config)
    assert_as_undisturbed(config, make_config)


@pytest.mark.drill("D8")
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(make_config):
    config = make_config(steps=2)
    session.adapt(config)
    folder = Path(config.run_directory)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "export")
    with pytest.raises(CheckpointError, match="step 2 was saved, but no checkpoint is there"):
        session.adapt(config)
    session.adapt(config, fresh=True)
    assert files_of(config)["DONE"] == "2"


def test_an_export_is_refused_while_the_run_goes_on(said, make_config, tmp_path, monkeypatch):
    values = adaptations.recipe_values(tmp_path, steps=2)
    recipe = str(adaptations.write_recipe(tmp_path, values))
    arguments = ["--recipe", recipe, "--run-dir", tmp_path / "run"]
    update, outcomes = adaptation_run.AdaptationRun.update, []

    def and_meanwhile_export(run, *things):
        leftover = tmp_path / "run" / "checkpoints" / ".tmp-step-being-written"
        leftover.mkdir()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("softprompt_dist.parallel.join.join_world", pytest.fail)
            outcomes.append(said(adapt.main, *arguments, "--export", tmp_path / "out"))
        assert leftover.exists()
        leftover.rmdir()
        return update(run, *things)

    monkeypatch.setattr(adaptation_run.AdaptationRun, "update", and_meanwhile_export)
    session.adapt(make_config(steps=1))
    ((code, _, err),) = outcomes
    assert code == 2
    assert "is in use by process" in err
    assert not (tmp_path / "out").exists()
