"""A recipe of several stages becomes several adaptations, each begun with an earlier export."""

import shutil
import signal
from pathlib import Path

import pytest
import yaml

from softprompt_dist import adapt
from softprompt_dist.adapt_stages import choose_stages, load_stages
from softprompt_dist.adaptation import run as adaptation_run
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel import stop
from tests import adaptations
from tests.adaptations import assert_same
from tests.messages import assert_message

RECIPE = {
    "name": "both",
    "tokenizer": "tokens",
    "corpus": ["text.txt"],
    "inputs_length": 32,
    "batch": {"global_batch_size": 16, "micro_batch_size": 4},
    "stages": {
        "span": {"init": "from_config", "objective": "span_corruption", "steps": 6},
        "lm": {"steps": 4, "batch": {"micro_batch_size": 8}, "export": {"steps": [2]}},
        "more": None,
    },
}


@pytest.fixture
def write(tmp_path):
    def written(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False))
        return str(path)

    return written


def test_a_stages_own_keys_lie_on_top_of_the_common_ones(write):
    span, lm, more = load_stages(write(), run_directory="runs/both")
    assert [config.objective for config in (span, lm, more)] == [
        "span_corruption", "prefix_lm", "prefix_lm"
    ]  # fmt: skip
    assert [config.steps for config in (span, lm, more)] == [6, 4, 100000]
    assert {config.inputs_length for config in (span, lm, more)} == {32}
    assert [config.batch.micro_batch_size for config in (span, lm, more)] == [4, 8, 4]
    assert [config.batch.global_batch_size for config in (span, lm, more)] == [16, 16, 16]
    assert (span.export.steps, lm.export.steps) == ([], [2])
    assert [config.name for config in (span, lm, more)] == ["both-span", "both-lm", "both-more"]


def test_each_stage_has_a_folder_and_begins_with_the_export_of_the_one_before(write):
    span, lm, more = load_stages(write(), run_directory="runs/both")
    assert [config.run_directory for config in (span, lm, more)] == [
        "runs/both/span", "runs/both/lm", "runs/both/more"
    ]  # fmt: skip
    assert (span.init, span.backbone) == ("from_config", None)
    assert (lm.init, lm.backbone) == ("from_checkpoint", "runs/both/span/export")
    assert (more.init, more.backbone) == ("from_checkpoint", "runs/both/lm/export")


def test_where_the_folders_are(write):
    assert load_stages(write())[0].run_directory == "runs/both/span"
    assert load_stages(write(run_directory="elsewhere"))[0].run_directory == "elsewhere/span"
    given = load_stages(write(run_directory="elsewhere"), run_directory="given")
    assert given[0].run_directory == "given/span"


def test_overrides_change_all_stages_or_one(write):
    overrides = ["seed=7", "batch.micro_batch_size=2", "stages.lm.steps=9"]
    span, lm, more = load_stages(write(), overrides)
    assert {config.seed for config in (span, lm, more)} == {7}
    assert {config.batch.micro_batch_size for config in (span, lm, more)} == {2}
    assert [config.steps for config in (span, lm, more)] == [6, 9, 100000]


def test_an_override_of_all_stages_wins_over_a_stages_own_key(write):
    assert {config.steps for config in load_stages(write(), ["steps=3"])} == {3}


def test_a_recipe_without_stages_is_one(write):
    path = write(backbone="t5")
    values = yaml.safe_load(Path(path).read_text())
    del values["stages"]
    Path(path).write_text(yaml.safe_dump(values))
    (config,) = load_stages(path, ["steps=3"])
    assert (config.steps, config.run_directory, config.name) == (3, "runs/both", "both")
    assert load_stages(path, run_directory="given")[0].run_directory == "given"
    with pytest.raises(ConfigError, match="'stages'|Unknown key"):
        load_stages(path, ["stagse.lm.steps=3"])


def test_one_stage_may_be_chosen(write):
    configs = load_stages(write())
    assert choose_stages(configs, None) == configs
    assert choose_stages(configs, "lm") == [configs[1]]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "`stages` must be a mapping of names"),
        ({}, "`stages` must be a mapping of names"),
        ({"a b": {}}, "'a b' is no stage"),
        ({"../out": {}}, "'../out' is no stage"),
        ({"span": 3}, "'span' is no stage"),
        ({"span": {"init": "from_config", "stesp": 3}}, r"Stage 'span' of(.|\n)*'stesp'.*'steps'"),
        ({"span": {"steps": 3}}, "`backbone` must name a checkpoint"),
        ({"span": {"init": "from_config", "dtype": "fp16"}}, "fp16 breaks T5.*use bf16"),
    ],
)
def test_stages_that_cannot_be(write, stages, message):
    with pytest.raises(ConfigError, match=message):
        load_stages(write(stages=stages))


def test_an_override_of_a_stage_that_is_not_there(write):
    with pytest.raises(
        ConfigError, match=r"no stage 'spam'. Did you mean 'span'\? Stages: span, lm"
    ):
        load_stages(write(), ["stages.spam.steps=9"])


def test_the_verb_names_the_nearest_stage(said, write):
    outcome = said(adapt.main, "--recipe", write(), "--stage", "spam")
    assert_message(outcome, "no stage 'spam'", "Did you mean 'span'?", "span, lm, more")


def test_an_export_needs_one_stage(said, write, tmp_path):
    outcome = said(adapt.main, "--recipe", write(), "--export", tmp_path / "out")
    assert_message(outcome, "has 3", "--stage NAME")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_every_stage_and_writes_nothing(said, write, tmp_path):
    run_dir = tmp_path / "run"
    code, out, _ = said(adapt.main, "--recipe", write(), "--run-dir", run_dir, "--dry-run")
    assert code == 0
    printed = list(yaml.safe_load_all(out))
    assert [values["run_directory"] for values in printed] == [
        f"{run_dir}/{name}" for name in ("span", "lm", "more")
    ]
    assert not run_dir.exists()


@pytest.fixture
def two_stages(lone_process, tmp_path, monkeypatch):
    adaptations.make_quick(monkeypatch, tmp_path / "cache")
    values = adaptations.recipe_values(tmp_path)
    common = {key: values[key] for key in values if key not in ("init", "objective", "steps")}
    stages = {
        "span": {"init": "from_config", "objective": "span_corruption", "steps": 2},
        "lm": {"objective": "prefix_lm", "steps": 4},
    }
    common |= {"name": "both", "stages": stages, "checkpoint": {"every_steps": 3}}
    return str(adaptations.write_recipe(tmp_path, common))


def test_two_stages_by_one_command(said, two_stages, tmp_path):
    run_dir = tmp_path / "both"
    arguments = ["--recipe", two_stages, "--run-dir", run_dir]
    assert said(adapt.main, *arguments)[0] == 0
    card = (run_dir / "lm" / "export" / "README.md").read_text()
    assert "| both-span | span_corruption | 2 |" in card
    assert "| both-lm | prefix_lm | 4 |" in card
    weights = adaptations.exported(run_dir / "lm")

    code, out, _ = said(adapt.main, *arguments)
    assert code == 0
    assert "All 2 steps are done" in out
    assert "All 4 steps are done" in out

    # Stopped between the two: what --resume asks of the run holds for the run, not every stage.
    shutil.rmtree(run_dir / "lm")
    (run_dir / "step").write_text("2\n")
    assert said(adapt.main, *arguments, "--resume")[0] == 0
    again = adaptations.exported(run_dir / "lm")
    assert all(weights[name].equal(again[name]) for name in weights)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("stopped_in", [(1, "span"), (5, "lm")], ids=str)
def test_stages_are_one_run(said, two_stages, tmp_path, signalled_in, stopped_in):
    step, stage = stopped_in

    def command(name):
        return said(adapt.main, "--recipe", two_stages, "--run-dir", tmp_path / name)

    def outcome(name):
        folder = tmp_path / name
        return [
            (folder / file).read_text().strip() if (folder / file).exists() else None
            for file in ("DONE", "why", "step")
        ]

    signalled_in(adaptation_run.AdaptationRun, "update", call=step, number=signal.SIGTERM)
    code, out, _ = command("stopped")
    assert code == 0
    told = f"SIGTERM after step {step}, which is saved."
    assert f"Stopped: {told}" in out
    assert outcome("stopped") == [None, f"signal: {told}", str(step)]
    assert (tmp_path / "stopped" / "lm").exists() == (stage == "lm")
    assert not (tmp_path / "stopped" / stage / "export").exists()
    for name in ("stopped", "whole"):
        stop.forget()
        assert command(name)[0] == 0
        assert outcome(name) == ["6", "done", "6"]
        assert not (tmp_path / name / "lm" / "why").exists()
    ours, theirs = (tmp_path / name / "lm" for name in ("stopped", "whole"))
    assert_same(adaptations.exported(ours), adaptations.exported(theirs))


def test_one_stage_of_several_counts_the_steps_before_it(said, two_stages, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--recipe", two_stages, "--run-dir", folder]
    for stage, step in (("span", "2"), ("lm", "6")):
        assert said(adapt.main, *arguments, "--stage", stage)[0] == 0
        assert (folder / "DONE").read_text() == f"{step}\n"
        assert (folder / "step").read_text() == f"{step}\n"
    shutil.rmtree(folder / "lm")
    code, _, err = said(adapt.main, *arguments)
    assert code == 2
    assert "step 6 was saved, but no checkpoint is there" in err
    assert (folder / "why").read_text().startswith("fatal: ")
    assert not (folder / "DONE").exists()
    assert said(adapt.main, *arguments, "--stage", "lm", "--fresh")[0] == 0
    assert (folder / "DONE").read_text() == "6\n"
