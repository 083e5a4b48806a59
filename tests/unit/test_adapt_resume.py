"""Runs that are continued are the uninterrupted ones; those that are others are refused."""

import shutil
from pathlib import Path

import pytest

from softprompt_dist.adaptation import session
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import CheckpointError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import session as tuning_session
from tests import adaptations
from tests.adaptations import assert_same
from tests.damage import flip_bit, truncate

pytestmark = pytest.mark.usefixtures("world_of_adaptations")
FACTORED = adaptations.ARCHITECTURE | {"d_model": 128, "d_ff": 128}


@pytest.mark.drill("D16")
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adafactor", "dropout": 0.1},
        {"optimizer": "rms_scaled_adamw", "decay_steps": 3},
        {"optimizer": "adamw", "engine": {"zero_stage": 2}},
        {"optimizer": "adafactor", "engine": {"zero_stage": 3}, "dtype": "bf16"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make_config, settings):
    whole = make_config("whole", **settings)
    session.adapt(whole)
    killed = make_config("killed", **settings)
    kept = adaptations.checkpoint(killed.run_directory, 2)
    shutil.copytree(adaptations.checkpoint(whole.run_directory, 2), kept)
    session.adapt(killed, must_resume=True)
    ours, theirs = killed.run_directory, whole.run_directory
    tensors = adaptations.checkpoint_tensors(theirs, 4)
    assert_same(adaptations.checkpoint_tensors(ours, 4), tensors)
    assert adaptations.checkpoint_state(ours, 4) == adaptations.checkpoint_state(theirs, 4)
    assert_same(adaptations.exported(ours), adaptations.exported(theirs))
    before = adaptations.checkpoint_tensors(theirs, 2)
    assert any(not tensors[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    ("damage", "file"), [(truncate, "model.safetensors"), (flip_bit, "small.safetensors")]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(make_config, damage, file, caplog):
    config = make_config(optimizer="adafactor", architecture=FACTORED)
    session.adapt(config)
    expected = adaptations.exported(config.run_directory)
    shutil.rmtree(Path(config.run_directory) / "export")
    damage(adaptations.checkpoint(config.run_directory, 4) / file)
    session.adapt(config, must_resume=True)
    assert "corrupt-step-00000004" in caplog.text
    assert_same(adaptations.exported(config.run_directory), expected)


@pytest.mark.drill("D38")
def test_a_checkpoint_of_another_recipe_or_corpus_is_refused(make_config, tmp_path):
    session.adapt(make_config(steps=3))
    with pytest.raises(CheckpointError, match=r"learning_rate: saved 0.02, now 0.5.*--fresh"):
        session.adapt(make_config(learning_rate=0.5))
    other = tmp_path / "other.txt"
    other.write_text("Quite another text that is long enough for a piece of some length. \n" * 20)
    with pytest.raises(CheckpointError, match="corpus fingerprint: saved"):
        session.adapt(make_config(corpus=[str(other)]))


def test_what_does_not_change_the_result_may_change(make_config, tmp_path):
    session.adapt(make_config(steps=3))
    shutil.move(tmp_path / "run" / "export", tmp_path / "earlier")
    moved = shutil.copy(tmp_path / "text.txt", tmp_path / "moved.txt")
    changed = make_config(
        corpus=[str(moved)],
        batch={"global_batch_size": 12, "micro_batch_size": 4},
        engine={"zero_stage": 2},
        checkpoint={"every_steps": 2, "keep_last": 9, "background": False},
        health={"spike_sigmas": 9.0},
    )
    session.adapt(changed, must_resume=True)
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000002", "step-00000003", "step-00000004"
    ]  # fmt: skip


def test_fresh_sets_the_old_run_aside(make_config, tmp_path):
    session.adapt(make_config(steps=3))
    shutil.rmtree(tmp_path / "run" / "export")
    session.adapt(make_config(steps=3, learning_rate=0.5), fresh=True)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    steps = {"step-00000002", "step-00000003"}
    assert names == steps | {f"discarded-{name}" for name in steps}


def test_tuning_does_not_continue_an_adaptation(make_config, tiny_recipe):
    config = make_config(steps=1)
    session.adapt(config)
    tuning = load_recipe(TuneConfig, tiny_recipe, [f"run_directory={config.run_directory}"])
    with pytest.raises(CheckpointError, match=r"step 1 belongs to another run(.|\n)*--fresh"):
        tuning_session.train(tuning)
