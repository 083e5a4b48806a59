"""Two ranks that write checkpoints while they train: killed, signalled, and with a full disk."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from launch import run_function_on_ranks, start_function_on_ranks

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation import checkpoint, loop, measures, peak, session, sharded_files
from softprompt_dist.adaptation import run as adaptation_run
from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.lifecycle import ownership
from softprompt_dist.parallel import groups, ranks, stop
from tests import adaptations
from tests.adaptations import assert_same
from tests.damage import disk_full, names

_DEADLINE = 60
FILES = ("model.safetensors", "small.safetensors", "rng.safetensors")


def train(values):
    """A run in this world; what it ended with, and the checkpoints that are there then."""
    loop.draw_curves = lambda directory: None
    peak._SECONDS_OF_MEASURING = ownership._SETTLING_SECONDS = 0.0
    stop.listen()
    said = "done"
    try:
        session.adapt(AdaptConfig.model_validate(values))
    except SoftpromptError as error:
        said = f"{type(error).__name__}: {error}"
    stop.forget()
    folder = Path(values["run_directory"])
    found = ranks.on_main(lambda: names(folder / "checkpoints"))
    ranks.gather_objects(None)
    return said, found


def train_until_the_writer_waits(values):
    """Go on training while the writer of step 4 has written all its files, and for ever after."""
    publish = checkpoint.CheckpointFolder.publish

    def stuck(folder, temporary, final, verify):
        if final.name == "step-00000004":
            (folder.path.parent / "writing").touch()
            threading.Event().wait()
        publish(folder, temporary, final, verify)

    checkpoint.CheckpointFolder.publish = stuck
    train(values)


def train_all(plan):
    """Every run of the plan, with what befalls it."""
    outcomes = {}
    for name, (values, trouble) in plan.items():
        undo = TROUBLES[trouble]() if trouble else lambda: None
        outcomes[name] = train(values)
        undo()
    return outcomes


def full_disk_behind_step_4():
    """On rank 0 alone, in the writer's thread; both ranks wait for its end before they go on."""
    write, update = sharded_files._write_files, adaptation_run.AdaptationRun.update

    def full(*arguments):
        disk_full()

    def updated(run, *arguments):
        metrics = update(run, *arguments)
        if run.step == 3:
            sharded_files._write_files = full
        if run.step == 5:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join(_DEADLINE)
        assert run.step < 6, "the failure was not heard"
        return metrics

    adaptation_run.AdaptationRun.update = updated

    def undo():
        sharded_files._write_files, adaptation_run.AdaptationRun.update = write, update

    return undo


def signal_to_rank_1_in_training():
    update = adaptation_run.AdaptationRun.update

    def updated(run, *arguments):
        if run.step == 2 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return update(run, *arguments)

    adaptation_run.AdaptationRun.update = updated
    return lambda: setattr(adaptation_run.AdaptationRun, "update", update)


def signal_to_rank_1_in_measuring():
    leaks, calls = measures._summed_leaks, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 2 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return leaks(*arguments)

    measures._summed_leaks = interrupted
    return lambda: setattr(measures, "_summed_leaks", leaks)


def signal_to_rank_1_while_rank_0_tokenises():
    """Rank 0 would tokenise for a minute; it is told within a second or two."""
    work = adaptation_run.open_corpus

    def slow(*arguments):
        if not ranks.is_main():
            return work(*arguments)
        deadline = time.monotonic() + _DEADLINE
        while time.monotonic() < deadline:
            adaptation_run.polling.poll()
            time.sleep(0.01)
        return work(*arguments)

    adaptation_run.open_corpus = slow
    if ranks.rank() == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return lambda: setattr(adaptation_run, "open_corpus", work)


def slow_first_save():
    """Nobody but the writers waits for it."""
    save, waited = AdaptationCheckpointStore.save, []

    def slow(*arguments):
        if not waited and threading.current_thread() is not threading.main_thread():
            waited.append(None)
            time.sleep(0.5 if ranks.is_main() else 0.0)
        save(*arguments)

    AdaptationCheckpointStore.save = slow
    return lambda: setattr(AdaptationCheckpointStore, "save", save)


TROUBLES = {
    function.__name__: function
    for function in (
        full_disk_behind_step_4,
        signal_to_rank_1_in_training,
        signal_to_rank_1_in_measuring,
        signal_to_rank_1_while_rank_0_tokenises,
        slow_first_save,
    )
}


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptations")

    def values(name, stage=2, background=True, **changes):
        settings = {
            "run_directory": str(folder / name),
            "steps": 6,
            "dropout": 0.1,
            "optimizer": "adafactor",
            "architecture": adaptations.ARCHITECTURE | {"d_model": 128, "d_ff": 131},
            "engine": {"zero_stage": stage},
            "checkpoint": {"every_steps": 2, "keep_last": 9, "background": background},
            "validation_corpus": [str(folder / "text.txt")],
            "evaluation": {"every_steps": 2, "max_examples": 13},
        }
        return adaptations.recipe_values(folder, **settings | changes)

    return values


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return {"SOFTPROMPT_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def killed(recipe_of, module_rank_logs, env):
    """A run whose ranks were killed while the writer had all of step 4 but its name."""
    values = recipe_of("killed")
    writing = Path(values["run_directory"]) / "writing"
    with start_function_on_ranks(
        train_until_the_writer_waits, 2, module_rank_logs(), env=env, values=values
    ) as running:
        running.wait_until(writing.exists, _DEADLINE)
        for rank in (0, 1):
            running.kill(rank)
    return names(Path(values["run_directory"]) / "checkpoints")


@pytest.fixture(scope="module")
def outcomes(recipe_of, killed, module_rank_logs, env):
    """How the runs of one world ended, on both ranks."""
    plan = {
        "killed": (recipe_of("killed"), ""),
        **{f"beside-{s}": (recipe_of(f"beside-{s}", s), "slow_first_save") for s in (0, 2, 3)},
        **{f"plain-{s}": (recipe_of(f"plain-{s}", s, background=False), "") for s in (0, 2, 3)},
        "full": (recipe_of("full", steps=9), "full_disk_behind_step_4"),
        "full again": (recipe_of("full"), ""),
    }
    for when in ("in_training", "in_measuring", "while_rank_0_tokenises"):
        plan[when] = (recipe_of(when), f"signal_to_rank_1_{when}")
        plan[f"{when} again"] = (recipe_of(when), "")
    logs = module_rank_logs()
    said = run_function_on_ranks(train_all, 2, logs, plan=plan, timeout=300, env=env)
    assert said[0] == said[1], "the ranks ended differently"
    return said[0]


def folder(recipe_of, name):
    return Path(recipe_of(name)["run_directory"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_background_writes_what_the_foreground_writes(outcomes, recipe_of, stage):
    steps = [f"step-0000000{step}" for step in (2, 4, 6)]
    assert outcomes[f"beside-{stage}"] == outcomes[f"plain-{stage}"] == ["done", steps]
    ours, theirs = (folder(recipe_of, f"{kind}-{stage}") for kind in ("beside", "plain"))
    for step in (2, 4, 6):
        for name in FILES:
            content = (adaptations.checkpoint(ours, step) / name).read_bytes()
            assert content == (adaptations.checkpoint(theirs, step) / name).read_bytes()
        states = [adaptations.checkpoint_state(run, step) for run in (ours, theirs)]
        assert states[0] == states[1]


def assert_as_undisturbed(outcomes, recipe_of, name):
    ours, theirs = folder(recipe_of, name), folder(recipe_of, "plain-2")
    assert_same(adaptations.checkpoint_tensors(ours, 6), adaptations.checkpoint_tensors(theirs, 6))
    assert adaptations.checkpoint_state(ours, 6) == adaptations.checkpoint_state(theirs, 6)
    assert_same(adaptations.exported(ours), adaptations.exported(theirs))
    for file, content in {"DONE": "6\n", "why": "done\n", "step": "6\n"}.items():
        assert (ours / file).read_text() == content


@pytest.mark.drill("D2", "D21")
def test_a_kill_while_the_writer_runs_costs_what_it_had_not_published(killed, outcomes, recipe_of):
    published, unpublished = killed[1:], killed[0]
    assert published == ["step-00000002"]
    assert unpublished.startswith(".tmp-step-")
    said, left = outcomes["killed"]
    assert said == "done"
    assert unpublished not in left
    assert_as_undisturbed(outcomes, recipe_of, "killed")


@pytest.mark.drill("D21")
def test_a_writer_that_fails_ends_both_ranks_at_the_next_step(outcomes, recipe_of):
    said, left = outcomes["full"]
    assert "step-00000004 could not be written: No space left on device" in said
    assert left == ["step-00000002"]
    assert outcomes["full again"][0] == "done"
    assert_as_undisturbed(outcomes, recipe_of, "full")


@pytest.mark.drill("D3", "D4")
@pytest.mark.parametrize(
    ("when", "said", "steps"),
    [
        ("in_training", "SIGUSR2 after step 3, which is saved.", [2, 3]),
        ("in_measuring", "SIGTERM after step 2, which is saved.", [2]),
        ("while_rank_0_tokenises", "SIGTERM while tokenising the text.", []),
    ],
)
def test_a_signal_to_one_rank_ends_both_alike(outcomes, recipe_of, when, said, steps):
    assert outcomes[when][0].startswith(f"StoppedError: {said}")
    assert outcomes[when][1] == [f"step-0000000{step}" for step in steps]
    assert outcomes[f"{when} again"][0] == "done"
    assert_as_undisturbed(outcomes, recipe_of, when)


def try_a_group(broken_on):
    if broken_on is not None:
        groups._PROBE = timedelta(seconds=5)  # so long the others wait for it
    if ranks.rank() == broken_on:
        os.environ["GLOO_SOCKET_IFNAME"] = "none-of-that-name"
    return groups.cpu_group_problem()


def test_a_network_that_gloo_cannot_use_is_known_to_all_ranks(run_on_ranks):
    assert run_on_ranks(try_a_group, 2, broken_on=None) == ["", ""]
    first, second = run_on_ranks(try_a_group, 2, broken_on=1)
    assert first == second
    assert first.startswith("rank ")
