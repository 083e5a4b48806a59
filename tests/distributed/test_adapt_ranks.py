"""Adaptations that are continued, on as many ranks as before or on others, are the same ones.

A launch costs its imports, so one world carries out many runs.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation import peak, session
from softprompt_dist.adaptation import run as adaptation_run
from softprompt_dist.parallel import ranks
from tests import adaptations, runs

OPTIMIZERS = ("adafactor", "rms_scaled_adamw", "adamw")
RATES = {"adafactor": 0.01, "rms_scaled_adamw": 0.005, "adamw": 0.001}
STAGES = (0, 2, 3)
MOVED, LAST = ("adafactor", "rms_scaled_adamw"), 24
"""Optimizers whose runs are continued after step 4 by other worlds, and where those end."""
SMALL_GROUPS = {"stage": 3, "sub_group_size": 30_000, "stage3_param_persistence_threshold": 0}


def carry_out(plan, rank_to_be_stopped=None):
    """Carry out the runs of `plan` in this world; with a rank, warn it at step 2 of the last."""
    session.draw_curves = lambda directory: None
    peak._SECONDS_OF_MEASURING = 0.0
    for number, values in enumerate(plan):
        config = AdaptConfig.model_validate(values)
        zero = {"zero_optimization": SMALL_GROUPS} if config.engine.zero_stage == 3 else None
        if number == len(plan) - 1 and rank_to_be_stopped is not None:
            warn_at_step_2(rank_to_be_stopped)
        session.adapt(config, zero)


def warn_at_step_2(rank):
    update = adaptation_run.AdaptationRun.update

    def update_and_be_warned(run, batches):
        metrics = update(run, batches)
        if run.step == 2 and ranks.rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    adaptation_run.AdaptationRun.update = update_and_be_warned


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
    """Runs of a world of two by their names: whole ones, and those that were continued."""
    whole = [recipe_of(f"whole-{o}-{s}", o, s) for o in OPTIMIZERS for s in STAGES]
    resumed = [recipe_of(f"resumed-{o}-{s}", o, s) for o in OPTIMIZERS for s in STAGES]
    long = [moved(recipe_of, optimizer, 2) for optimizer in MOVED]
    stopped = recipe_of("stopped", "adafactor", 2)
    run_functions(carry_out, 2, plan=[*whole, *long, stopped], rank_to_be_stopped=1, timeout=240)
    found = {Path(v["run_directory"]).name: v for v in (*whole, *long, *resumed, stopped)}
    stopped["checkpoints_at_stop"] = sorted(
        path.name for path in (Path(stopped["run_directory"]) / "checkpoints").iterdir()
    )
    for uninterrupted, killed in zip(whole, resumed, strict=True):
        copy_checkpoint(uninterrupted, killed, 2)
    at_stop = stopped.pop("checkpoints_at_stop")
    run_functions(carry_out, 2, plan=[*resumed, stopped], timeout=240)
    return found, at_stop


def copy_checkpoint(source, target, step):
    folders = (adaptations.checkpoint(v["run_directory"], step) for v in (source, target))
    shutil.copytree(*folders)


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
        Path(two_ranks[0][f"{kind}-{optimizer}-{stage}"]["run_directory"])
        for kind in ("whole", "resumed")
    )
    assert_same_run(resumed, whole, 4)
    before, after = (adaptations.checkpoint_tensors(whole, step) for step in (2, 4))
    assert not before["shared.weight"].equal(after["shared.weight"])


def test_a_stop_asked_of_one_rank_stops_both_and_is_continued(two_ranks):
    found, at_stop = two_ranks
    assert at_stop == ["step-00000002"]
    stopped, whole = (found[name]["run_directory"] for name in ("stopped", "whole-adafactor-2"))
    assert_same_run(stopped, whole, 4)


def metrics_of(values, kind):
    with (Path(values["run_directory"]) / "metrics.jsonl").open() as lines:
        entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry for entry in entries if kind in entry and entry["step"] > 4}


@pytest.fixture(scope="module")
def elsewhere(two_ranks, recipe_of, run_functions):
    """What worlds of one and of three made of the checkpoints of two."""
    found, _ = two_ranks
    plans = {1: ("one", 0), 3: ("three", 3)}
    for world_size, (world, stage) in plans.items():
        plan = [moved(recipe_of, optimizer, stage, world) for optimizer in MOVED]
        for values in plan:
            optimizer = values["optimizer"]
            copy_checkpoint(found[f"moved-{optimizer}-two"], values, 4)
            found[f"moved-{optimizer}-{world}"] = values
        run_functions(carry_out, world_size, plan=plan, timeout=240)
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
