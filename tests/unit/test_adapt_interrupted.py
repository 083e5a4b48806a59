"""Adaptations that were ended at bad moments, or started again where something lies already."""

import shutil

import pytest
import torch

from softprompt_dist import adapt
from softprompt_dist.adapt_stages import load_stages
from softprompt_dist.adaptation import run as adaptation_run
from softprompt_dist.adaptation import session
from softprompt_dist.adaptation.run import build_run
from softprompt_dist.errors import BackboneError, ConfigError, DataError
from tests import adaptations
from tests.adaptations import started, updates

pytestmark = pytest.mark.usefixtures("world_of_adaptations")


def test_an_export_that_a_kill_prevented_is_made_by_the_resume(make_config, tmp_path):
    config = make_config(steps=4, export={"steps": [2]})
    session.adapt(config)
    folder = tmp_path / "run" / "export-step-00000002"
    expected = adaptations.exported(tmp_path / "run", folder.name)
    # Killed between the checkpoint of step 2 and its export.
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "export")
    shutil.rmtree(adaptations.checkpoint(tmp_path / "run", 4))
    session.adapt(config)
    found = adaptations.exported(tmp_path / "run", folder.name)
    assert [name for name in expected if not found[name].equal(expected[name])] == []
    assert (tmp_path / "run" / "export").is_dir()


def test_a_fresh_start_sets_nothing_aside_while_an_export_is_in_its_way(make_config, tmp_path):
    config = make_config(steps=2)
    session.adapt(config)
    before = sorted((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match="export is not empty.*Remove or rename"):
        session.adapt(config, fresh=True)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before


def test_where_an_export_cannot_go_is_said_before_anything_is_measured(
    make_config, monkeypatch, tmp_path
):
    config = make_config(steps=1)
    session.adapt(config)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(adaptation_run.AdaptationRun, "measure", lambda _: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="taken is not empty"):
        session.export_newest(config, None, tmp_path / "taken")


def test_a_fresh_start_of_stages_looks_at_all_of_them_first(tmp_path):
    stages = {"one": {"steps": 1}, "two": {"steps": 1, "objective": "prefix_lm"}}
    values = adaptations.recipe_values(tmp_path, stages=stages)
    recipe = str(adaptations.write_recipe(tmp_path, values))
    (tmp_path / "all" / "two" / "export").mkdir(parents=True)
    (tmp_path / "all" / "two" / "export" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="two/export is not empty"):
        adapt.main(["--recipe", recipe, "--run-dir", str(tmp_path / "all"), "--fresh"])
    assert not (tmp_path / "all" / "one").exists()


@pytest.mark.parametrize("folder", ["", "/"])
def test_an_export_needs_a_folder(folder):
    with pytest.raises(ConfigError, match="is no folder that can be made"):
        adapt.main(["--recipe", "paper-512-512", "--export", folder])


def test_dropout_is_drawn_by_the_seed(make_config):
    def drawn(seed):
        torch.rand(7)  # whatever went before
        started(make_config(seed=seed))
        return torch.rand(3)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_the_loss_is_divided_by_the_positions_that_rows_have(make_config):
    """Clipping and Adam's epsilon see it, so room for targets that is not used must not."""
    norms = []
    for room in (16, 64):
        (metrics,) = updates(started(make_config(targets_length=room)), 1)
        norms.append(metrics["gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_measure_that_nobody_trains_on_may_be_impossible(make_config, tmp_path, caplog):
    short = tmp_path / "short.txt"
    short.write_text("A river.\n")
    run = build_run(make_config(objective="prefix_lm", validation_corpus=[str(short)]), None)
    assert list(run.validation) == ["prefix_lm"]
    assert "span_corruption is not measured: The corpus has" in caplog.text
    with pytest.raises(DataError, match="validation_corpus: The corpus has .* tokens"):
        build_run(make_config(validation_corpus=[str(short)]), None)


@pytest.mark.parametrize("content", ["{", '[{"name": "span"}]', "[1]", "null"])
def test_a_history_that_tells_nothing_is_refused_before_the_first_step(
    make_config, tmp_path, content
):
    session.adapt(make_config(steps=1))
    (tmp_path / "run" / "export" / "adaptation.json").write_text(content)
    backbone = str(tmp_path / "run" / "export")
    with pytest.raises(BackboneError, match="adaptation.json does not tell what made"):
        build_run(make_config("next", init="from_checkpoint", backbone=backbone), None)


def test_no_override_makes_stages_share_a_folder_or_start_elsewhere(tmp_path):
    stages = {"one": {"init": "from_config"}, "two": None}
    values = adaptations.recipe_values(tmp_path, stages=stages, steps=6)
    recipe = str(adaptations.write_recipe(tmp_path, values))
    overrides = ["run_directory=elsewhere", "name=other", "backbone=somebody", "stages.two.steps=9"]
    one, two = load_stages(recipe, overrides)
    assert [c.run_directory for c in (one, two)] == ["elsewhere/one", "elsewhere/two"]
    assert [c.name for c in (one, two)] == ["other-one", "other-two"]
    assert (two.init, two.backbone) == ("from_checkpoint", "elsewhere/one/export")
    assert (one.steps, two.steps) == (6, 9)


@pytest.mark.parametrize(
    ("stages", "overrides"), [({1: {"steps": 2}}, []), ({"one": {}}, ["stages.one=5"])]
)
def test_what_is_no_stage_is_said(tmp_path, stages, overrides):
    values = adaptations.recipe_values(tmp_path, stages=stages)
    with pytest.raises(ConfigError, match="is no stage"):
        load_stages(str(adaptations.write_recipe(tmp_path, values)), overrides)


def test_a_model_that_writes_no_text_is_refused(make_config, tmp_path):
    folder = tmp_path / "vit"
    shutil.copytree(adaptations.TOKENIZER, folder)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    config = make_config(init="from_checkpoint", backbone=str(folder), objective="lm")
    with pytest.raises(BackboneError, match="type vit, which writes no text"):
        build_run(config, None)
