"""Tasks tuned together, in micro-batches by tokens: the ranks change nothing but rounding."""

import copy
import shutil

import pytest

from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.session import train
from tests import runs

ZERO3 = "backbone.sharding=zero3"
SEVEN = ["batch.global_batch_size=7", "batch.micro_batch_tokens=60"]
"""Examples that three ranks cannot share evenly."""
TWO = ["batch.global_batch_size=2", "batch.micro_batch_tokens=1000"]
"""Examples of which one rank of three gets none."""
RUNS = {
    "rows": [],
    "rows zero3": [ZERO3],
    "seven": SEVEN,
    "seven zero3": [*SEVEN, ZERO3],
    "two": TWO,
    "two zero3": [*TWO, ZERO3],
}
STEPS = 4


def tune(recipe, folder, plan):
    """One run after the other in this world; each continues what its directory has."""
    for name, overrides in plan.items():
        config = load_recipe(TuneConfig, recipe, [*overrides, f"run_directory={folder}/{name}"])
        sharded = config.backbone.sharding == "zero3"
        train(config, runs.PARTITION_EVERYTHING if sharded else None)


@pytest.fixture(scope="module")
def recipe(tiny_t5, tiny_data, tmp_path_factory):
    """Six rows an update, of two tasks."""
    folder = tmp_path_factory.mktemp("mixture")
    values = copy.deepcopy(runs.tiny_recipe(tiny_t5, tiny_data))
    sides = runs.write_splits(folder / "sides", runs.SIDES)
    values["mixture"] = {"tasks": [runs.task("sides", sides, runs.SIDES)]}
    values["batch"] = {"global_batch_size": 6, "micro_batch_size": 2}
    values |= {"steps": STEPS, "checkpoint": {"every_steps": 2}}
    return runs.write_recipe(folder / "mixture.yaml", values)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """Folder of the runs of one rank, and of one that ended early."""
    folder = tmp_path_factory.mktemp("alone")
    tune(recipe, folder, {"rows": [], "seven": SEVEN, "two": TWO, "half": ["steps=2"]})
    return folder


@pytest.fixture(scope="module")
def on_three(recipe, alone, run_functions, tmp_path_factory):
    """Folder of the same runs on three ranks, sharded too, and of the one that is continued."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(alone / "half", folder / "half")
    run_functions(tune, 3, recipe=recipe, folder=folder, plan={**RUNS, "half": []}, timeout=240)
    return folder


def curve(run_dir, name):
    return [line[name] for line in runs.metrics_without_time(run_dir, "train")]


@pytest.mark.parametrize("name", [*RUNS, "half"])
def test_three_ranks_tune_as_one_alone(on_three, alone, name):
    whole = alone / (name.split()[0] if name in RUNS else "rows")
    found = on_three / name
    assert len(curve(found, "loss")) == STEPS
    assert curve(found, "num_tokens") == curve(whole, "num_tokens")
    for value in ("loss", "gradient_norm"):
        assert curve(found, value) == pytest.approx(curve(whole, value), abs=1e-5)
    ours, theirs = (runs.checkpoint_tensors(run, STEPS)["prompt"] for run in (found, whole))
    assert float((ours - theirs).abs().max()) < 1e-4
    scores = [runs.metrics_without_time(run, "validation")[0] for run in (found, whole)]
    assert scores[0] == scores[1]
    assert {"foods/accuracy", "sides/accuracy", "score"} <= set(scores[0])
