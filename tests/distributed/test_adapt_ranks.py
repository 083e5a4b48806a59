"""Adaptations that are continued, on as many ranks as before or on others, are the same ones.

A launch costs its imports, so one world carries out many runs.
"""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation import loop, peak, session
from softprompt_dist.lifecycle import ownership
from softprompt_dist.parallel import ranks
from tests import adaptations, runs

OPTIMIZERS = ("adafactor", "rms_scaled_adamw", "adamw")
RATES = {"adafactor": 0.01, "rms_scaled_adamw": 0.005, "adamw": 0.001}
STAGES = (0, 2, 3)
MOVED, LAST = ("adafactor", "rms_scaled_adamw"), 24
"""Optimizers whose runs are continued after step 4 by other worlds, and where those end."""
SMALL_GROUPS = {"stage": 3, "sub_group_size": 30_000, "stage3_param_persistence_threshold": 0}


def carry_out(plan):
    """Carry out the runs of `plan` in this world."""
    loop.draw_curves = lambda directory: None
    peak._SECONDS_OF_MEASURING = ownership._SETTLING_SECONDS = 0.0
    for run in plan:
        carried_out(**run)


def carried_out(values, begun_with=None):
    """Carry out a run; `begun_with` is a checkpoint of another run, from which it goes on."""
    config = AdaptConfig.model_validate(values)
    checkpoints = Path(config.run_directory) / "checkpoints"
    if begun_with:
        copy = partial(shutil.copytree, begun_with, checkpoints / Path(begun_with).name)
        ranks.on_main(lambda: copy() and None)
    zero = {"zero_optimization": SMALL_GROUPS} if config.engine.zero_stage == 3 else None
    session.adapt(config, zero)


@pytest.fixture(scope="module")
def recipe_of(tiny_t5, tmp_path_factory):
    """Settings of a run by its name, optimizer and stage."""
    folder = tmp_path_factory.mktemp("adaptations")
    texts = [row["text"] for row in runs.make_rows(300, seed=0)]

    def values(name, optimizer, stage, **changes):
        found = adaptations.recipe_values(
            folder,
            tokenizer=str(tiny_t5),
            architecture=adaptations.ARCHITECTURE | {"d_model": 128, "d_kv": 64, "d_ff": 131},
            objective="prefix_lm",
            optimizer=optimizer,
            learning_rate=RATES[optimizer],
            warmup_steps=0,
            dropout=0.0 if name.startswith("moved") else 0.1,
            run_directory=str(folder / name),
            engine={"zero_stage": stage},
            batch={"global_batch_size": 12, "micro_batch_size": 2},
            validation_corpus=[str(folder / "text.txt")],
            **changes,
        )
        (folder / "text.txt").write_text("\n".join(texts))
        return found

    return values


def moved(recipe_of, optimizer, stage, world="two"):
    checkpoint = {"every_steps": 4, "keep_last": 9}
    name = f"moved-{optimizer}-{world}"
    return recipe_of(name, optimizer, stage, steps=LAST, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def two_ranks(recipe_of, run_functions):
    """Runs of a world of two by their names."""
    plan, found = [], {}

    def add(values, **how):
        plan.append({"values": values, **how})
        found[Path(values["run_directory"]).name] = values

    for optimizer, stage in itertools.product(OPTIMIZERS, STAGES):
        whole = recipe_of(f"whole-{optimizer}-{stage}", optimizer, stage)
        begun_with = adaptations.checkpoint(whole["run_directory"], 2)
        add(whole)
        add(recipe_of(f"resumed-{optimizer}-{stage}", optimizer, stage), begun_with=begun_with)
    for optimizer in MOVED:
        add(moved(recipe_of, optimizer, 2))
    run_functions(carry_out, 2, plan=plan, timeout=400)
    return found


def assert_same_run(ours, theirs, step):
    tensors, expected = (adaptations.checkpoint_tensors(folder, step) for folder in (ours, theirs))
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not tensors[name].equal(expected[name])] == []
    assert adaptations.checkpoint_state(ours, step) == adaptations.checkpoint_state(theirs, step)
    weights, exported = (adaptations.exported(folder) for folder in (ours, theirs))
    assert [name for name in exported if not weights[name].equal(exported[name])] == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(two_ranks, optimizer, stage):
    whole, resumed = (
        Path(two_ranks[f"{kind}-{optimizer}-{stage}"]["run_directory"])
        for kind in ("whole", "resumed")
    )
    assert_same_run(resumed, whole, 4)
    before, after = (adaptations.checkpoint_tensors(whole, step) for step in (2, 4))
    assert not before["shared.weight"].equal(after["shared.weight"])


def metrics_of(values, kind):
    with (Path(values["run_directory"]) / "metrics.jsonl").open() as lines:
        entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry for entry in entries if kind in entry and entry["step"] > 4}


@pytest.fixture(scope="module")
def elsewhere(two_ranks, recipe_of, run_functions):
    """What worlds of one and of three made of the checkpoints of two."""
    found = two_ranks
    for world_size, world, stage in ((1, "one", 0), (3, "three", 3)):
        plan = []
        for optimizer in MOVED:
            values = moved(recipe_of, optimizer, stage, world)
            two = found[f"moved-{optimizer}-two"]["run_directory"]
            plan.append({"values": values, "begun_with": adaptations.checkpoint(two, 4)})
            found[f"moved-{optimizer}-{world}"] = values
        run_functions(carry_out, world_size, plan=plan, timeout=400)
    return found


@pytest.mark.parametrize("optimizer", MOVED)
@pytest.mark.parametrize("world", ["one", "three"])
def test_another_world_and_stage_go_on_as_the_first_would(elsewhere, optimizer, world):
    ours, theirs = (elsewhere[f"moved-{optimizer}-{name}"] for name in (world, "two"))
    losses, expected = (metrics_of(values, "loss") for values in (ours, theirs))
    assert list(losses) == list(expected) == list(range(5, LAST + 1))
    for step, metrics in expected.items():
        for name in ("loss", "gradient_norm", "update_rms"):
            assert losses[step][name] == pytest.approx(metrics[name], rel=1e-5), (step, name)
    measured, expected = (metrics_of(values, "prefix_lm_nll")[LAST] for values in (ours, theirs))
    assert measured["prefix_lm_nll"] == pytest.approx(expected["prefix_lm_nll"], rel=1e-5)
    weights, expected = (
        adaptations.checkpoint_tensors(v["run_directory"], LAST) for v in (ours, theirs)
    )
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        error = (weights[name] - weight).square().mean().sqrt() / weight.square().mean().sqrt()
        assert float(error) < 1e-5, name
    begun = adaptations.checkpoint_tensors(theirs["run_directory"], 4)["shared.weight"]
    assert float((expected["shared.weight"] - begun).norm() / begun.norm()) > 1e-2
    assert any(name.endswith("v_row") for name in expected) == (optimizer == "adafactor")
    states = [adaptations.checkpoint_state(v["run_directory"], LAST) for v in (ours, theirs)]
    assert states[0]["examples_consumed"] == states[1]["examples_consumed"]
    assert torch.isfinite(weights["shared.weight"]).all()
