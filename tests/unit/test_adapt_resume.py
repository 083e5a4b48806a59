"""Runs that are continued are the uninterrupted ones; those that are others are refused."""

import json
import shutil
from pathlib import Path

import pytest

from softprompt_dist.adaptation import session
from softprompt_dist.config import TuneConfig
from softprompt_dist.durable import digest_of
from softprompt_dist.errors import BackboneError, CheckpointError, ConfigError
from softprompt_dist.identity import Identity
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import session as tuning_session
from softprompt_dist.run.checkpoint_format import MANIFEST, STATE
from tests import adaptations
from tests.adaptations import assert_same
from tests.damage import flip_bit, truncate
from tests.unit.test_identity import (
    copy_with,
    identity_of,
    with_dealt_out_pieces,
    with_keys,
)

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


def exported_by(make_config, name="first", **changes):
    """A folder that a run of one step leaves."""
    config = make_config(name, steps=1, **changes)
    session.adapt(config)
    return Path(config.run_directory) / "export"


@pytest.fixture
def continued(make_config, tmp_path):
    """The recipe of a run of four steps from an export, with a checkpoint of step 2 alone."""
    source = exported_by(make_config)
    config = make_config(init="from_checkpoint", backbone=str(source), tokenizer=None, steps=2)
    session.adapt(config)
    shutil.move(tmp_path / "run" / "export", tmp_path / "earlier")
    return config.model_copy(update={"steps": 4})


@pytest.mark.drill("D38")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_keys(layer_norm_epsilon=0.1), "layer_norm_epsilon: 1e-06 there, 0.1 here"),
        (with_dealt_out_pieces, r"tokenizer\.vocabulary: \w+ there, \w+ here"),
    ],
)
def test_a_run_is_not_continued_with_another_source_unless_forced(
    continued, tmp_path, caplog, change, message
):
    other = copy_with(Path(continued.backbone), tmp_path / "other", change)
    (other / "adaptation.json").unlink()
    changed = continued.model_copy(update={"backbone": str(other)})
    with pytest.raises(CheckpointError, match=rf"(?s)step 2 began with.*{message}.*--force"):
        session.adapt(changed)
    (other / "config.json").write_bytes((Path(continued.backbone) / "config.json").read_bytes())
    (other / "tokenizer.json").write_bytes(
        (Path(continued.backbone) / "tokenizer.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"of other stages: \['small, 1 steps, .* \[\] here"):
        session.adapt(changed)
    session.adapt(changed, force=True)
    assert "of other stages" in caplog.text
    assert adaptations.checkpoint(changed.run_directory, 4).is_dir()


def test_a_history_of_other_weights_is_refused_unless_forced(make_config, tmp_path):
    source = exported_by(make_config)
    (told,) = json.loads((source / "adaptation.json").read_text())
    other = exported_by(make_config, "second", seed=7)
    (other / "adaptation.json").write_text(json.dumps([told]))
    config = make_config(init="from_checkpoint", backbone=str(other), tokenizer=None, steps=1)
    weights = told["exported"]["weights"]
    with pytest.raises(BackboneError, match=rf"(?s)tells what made.*weights: {weights} there"):
        session.adapt(config)
    session.adapt(config, force=True)


def test_an_export_and_a_prompt_on_it_have_one_identity(make_config, tmp_path):
    source = exported_by(make_config, export={"dtypes": ["fp32", "bf16"]})
    for folder in (source, source.with_name("export-bf16")):
        (told,) = json.loads((folder / "adaptation.json").read_text())
        there = Identity.from_json(told["exported"])
        assert there.differences(identity_of(folder)) == []
        assert there.weights == identity_of(source).weights
        assert there.weights in (folder / "README.md").read_text()
    config = make_config(init="from_checkpoint", backbone=str(source), tokenizer=None, steps=1)
    session.adapt(config)
    last = json.loads((tmp_path / "run" / "export" / "adaptation.json").read_text())[-1]
    assert Identity.from_json(last["source"]).weights == there.weights


def test_an_export_of_another_source_is_not_taken_for_this_one(make_config, tmp_path):
    sources = [exported_by(make_config, str(seed), seed=seed) for seed in (1, 2)]
    for source in sources:
        (source / "adaptation.json").unlink()
    first, second = (
        make_config(
            f"of-{source.parent.name}", init="from_checkpoint", backbone=str(source), steps=1
        )
        for source in sources
    )
    session.adapt(first)
    session.adapt(second)
    session.export_newest(first, None, tmp_path / "out")
    with pytest.raises(ConfigError, match="out is not empty"):
        session.export_newest(second, None, tmp_path / "out")


def test_a_checkpoint_of_release_0_1_goes_on(continued):
    folder = adaptations.checkpoint(continued.run_directory, 2)
    document = json.loads((folder / STATE).read_text())
    del document["state"]["source"], document["state"]["lineage"]
    (folder / STATE).write_text(json.dumps(document))
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = digest_of((folder / STATE).read_bytes())
    manifest["files"][STATE] = {"bytes": digest.num_bytes, "sha256": digest.sha256}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    session.adapt(continued, must_resume=True)
