"""Whatever interrupts a run on two ranks, nothing is lost, and it is said why.

A launch costs its imports, so one world carries out all runs; the signals are real ones.
"""

import math
from collections import Counter
from dataclasses import dataclass

import faults
import pytest
import torch

from softprompt_dist.run.checkpoint_format import read_checkpoint
from tests import runs

STEPS = 12
SETTINGS = [
    f"steps={STEPS}",
    "evaluation.every_steps=4",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
    "backbone.dropout=0.1",
]
STATE_FILES = ("state.safetensors", "rng.safetensors", "state.json")


@dataclass(frozen=True)
class Interruption:
    """What happens in a first attempt, what `why` says of it, and the steps that are published."""

    faults: list
    why: str
    published: list


INTERRUPTIONS = {
    "SIGTERM": Interruption(
        [("signal in step", 1, 6, "SIGTERM")],
        "signal: SIGTERM after step 6, which is saved.",
        [4, 6],
    ),
    "SIGUSR1": Interruption(
        [("signal in step", 0, 7, "SIGUSR1")],
        "signal: SIGUSR1 after step 7, which is saved.",
        [4, 7],
    ),
    "SIGUSR2": Interruption(
        [("signal in step", 1, 2, "SIGUSR2")], "signal: SIGUSR2 after step 2, which is saved.", [2]
    ),
    "second": Interruption(
        [("signal in step", 0, 3, "SIGUSR1"), ("signal before", 0, "save", "SIGTERM")],
        "signal: SIGUSR1 after step 3, which is saved.",
        [3],
    ),
    "STOP": Interruption(
        [("STOP in step", 0, 5)], "stop: STOP file after step 5, which is saved.", [4, 5]
    ),
    "loading": Interruption(
        [("signal before", 1, "load_backbone", "SIGTERM")],
        "signal: SIGTERM while loading the backbone. The same command begins again there.",
        [],
    ),
    "validating": Interruption(
        [("signal in validation", 1, 4, "SIGUSR1")],
        "signal: SIGUSR1 after step 4, which is saved.",
        [4],
    ),
    "scoring": Interruption(
        [("signal before", 1, "report_outcome", "SIGTERM")],
        "signal: SIGTERM while scoring. The same command begins again there.",
        [4, 8, 12],
    ),
}
SIGNALLED = ("SIGTERM", "SIGUSR1", "SIGUSR2", "STOP")
OTHERS = {
    "NaN": [("NaN in step", 1, 6)],
    "superseded": [("superseded in step", 0, 7)],
    "slow": [("waits", 1, 0.06)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def attempts(folder, tiny_recipe, run_functions):
    """How the attempts at each run ended, as both ranks tell: one, or one and its continuation."""
    plan = [("whole", [])]
    plan += [(name, each.faults) for name, each in INTERRUPTIONS.items()]
    plan += [(name, []) for name in INTERRUPTIONS]
    plan += OTHERS.items()
    settings = {name: [*SETTINGS, f"run_directory={folder / name}"] for name, _ in plan}
    settings["slow"].append("steps=20")
    both = run_functions(
        faults.carry_out,
        2,
        plan=[(settings[name], found) for name, found in plan],
        recipe=tiny_recipe,
    )
    assert [each["error"] for each in both[0]] == [each["error"] for each in both[1]]
    ended = {}
    for (name, _), found in zip(plan, both[0], strict=True):
        ended.setdefault(name, []).append(found)
    return ended


def steps_taken(run_dir):
    """Of all attempts, by TensorBoard's events, which are never rewritten."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    taken = []
    for file in sorted((run_dir / "tensorboard").iterdir()):
        events = EventAccumulator(str(file))
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            taken += [event.step for event in events.Scalars("train/loss")]
    return taken


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.drill("D3")) for name in SIGNALLED),
        pytest.param("second", marks=pytest.mark.drill("D5")),
        *(
            pytest.param(name, marks=pytest.mark.drill("D4"))
            for name in ("loading", "validating", "scoring")
        ),
    ],
)
def test_an_interrupted_run_is_the_run_that_was_not(attempts, folder, name, drilled):
    first, second = attempts[name]
    expected = INTERRUPTIONS[name]
    assert first["error"].startswith("StoppedError: ")
    assert first["why"] == expected.why
    assert first["published"] == expected.published
    assert second["error"] == ""
    assert second["why"] == "done"
    whole, run_dir = folder / "whole", folder / name
    assert (run_dir / "DONE").read_text() == f"{STEPS}\n"
    for file in STATE_FILES:
        ours, theirs = (runs.checkpoint_folder(d, STEPS) / file for d in (run_dir, whole))
        assert ours.read_bytes() == theirs.read_bytes(), file
    assert runs.metrics_without_time(run_dir) == runs.metrics_without_time(whole)
    best = "prompt/best.safetensors"
    assert (run_dir / best).read_bytes() == (whole / best).read_bytes()
    redone = sum(times - 1 for times in Counter(steps_taken(run_dir)).values())
    drilled(steps_redone=redone, seconds=second["seconds_to_first_step"])
    assert redone == 0


@pytest.mark.drill("D5")
def test_a_second_signal_leaves_one_valid_checkpoint(attempts, folder):
    content = read_checkpoint(runs.checkpoint_folder(folder / "second", 3))
    assert content.step == 3
    assert not list((folder / "second" / "checkpoints").glob(".tmp-*"))


@pytest.mark.drill("D14")
def test_nan_on_one_rank_stops_all_before_the_update(attempts, folder):
    (ended,) = attempts["NaN"]
    assert ended["error"].startswith("NonFiniteLossError: Step 6: ")
    assert ended["why"].startswith("fatal: Step 6: ")
    assert ended["published"] == [4, 5]
    tensors = runs.checkpoint_tensors(folder / "NaN", 5)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    losses = [line["loss"] for line in runs.metrics_without_time(folder / "NaN", "train")]
    assert len(losses) == 5
    assert all(map(math.isfinite, losses))


@pytest.mark.drill("D22")
def test_a_superseded_attempt_publishes_nothing(attempts, folder):
    (ended,) = attempts["superseded"]
    assert ended["error"].startswith("SupersededError: ")
    assert ended["published"] == [4]
    assert ended["why"] == "another's"
    assert (folder / "superseded" / "step").read_text() == "4\n"
    assert '"token": "ffff' in (folder / "superseded" / "attempt.json").read_text()


@pytest.mark.drill("D13")
def test_a_slow_rank_is_named_and_the_run_goes_on(attempts, folder):
    (ended,) = attempts["slow"]
    assert ended["error"] == ""
    assert ended["stragglers"][0] == 1
    assert '"straggler": "rank 1 on ' in (folder / "slow" / "heartbeat.json").read_text()
