"""Recipes of pipelines: what they mean, and what is refused before anything is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import check_values, load_recipe, recipe_names
from softprompt_dist.scheduling.batch_script import (
    gpus_per_node,
    merged_options,
    script_options,
    signal_lead_seconds,
    tasks_of,
    time_limit_seconds,
)
from softprompt_dist.scheduling.pipeline_config import PipelineConfig, overrides_of
from softprompt_dist.scheduling.pipeline_recipe import load_pipeline, pipeline_names
from softprompt_dist.scheduling.stages import Pipeline
from softprompt_dist.section import Section
from tests.pipelines import pipeline_values, write_pipeline

TUNE = {"recipe": "demo", "tasks": ["boolq"]}


class Anything(Section):
    """Takes any `values`, to see what overrides make of them."""

    values: Any


def config(**changes: Any) -> PipelineConfig:
    return check_values(PipelineConfig, {"name": "p", "tune": dict(TUNE)} | changes)


@pytest.mark.parametrize("name", pipeline_names())
def test_a_packaged_pipeline_is_right_and_no_recipe_of_another_verb(name: str) -> None:
    assert load_pipeline(name).name == name
    assert name not in recipe_names()


def test_stages_may_be_left_out() -> None:
    assert config().adapt is None
    assert config().tune.seeds == [0]
    alone = config(adapt={"recipe": "tiny-t5"}, tune=None)
    assert (alone.tune, alone.evaluate) == (None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune": None}, "give `adapt`, `tune` or both"),
        ({"tune": None, "evaluate": {}, "adapt": {"recipe": "a"}}, "Add `tune`, or remove"),
        ({"tnue": TUNE}, "Unknown key 'tnue'. Did you mean 'tune'?"),
        ({"tune": TUNE | {"seed": [1]}}, "Unknown key 'tune.seed'. Did you mean 'seeds'?"),
        ({"tune": TUNE | {"seeds": []}}, "tune.seeds: it is empty"),
        ({"tune": TUNE | {"tasks": []}}, "tune.tasks: it is empty"),
        ({"tune": TUNE | {"seeds": [1, 2, 1]}}, "1 stands there more than once"),
        ({"tune": TUNE | {"seeds": [-1]}}, "tune.seeds.0"),
        ({"tune": TUNE | {"tasks": ["a b"]}}, "tune.tasks.0"),
        ({"tune": TUNE | {"tasks": ["../x"]}}, "tune.tasks.0"),
        ({"tune": TUNE | {"parallel": 0}}, "tune.parallel"),
        ({"tune": TUNE | {"export": "export"}}, "there is no `adapt`"),
        ({"tune": TUNE | {"set": {"seed": 1}}}, "set `seeds` instead"),
        ({"tune": TUNE | {"set": {"task": {"catalogue": "cb"}}}}, "set `tasks` instead"),
        ({"tune": TUNE | {"set": {"run_directory": "x"}}}, "the pipeline's `directory`"),
        ({"tune": TUNE | {"set": {"deepspeed_config": "x"}}}, "stands beside `set`"),
        ({"name": "a/b"}, "name: a name has"),
        ({"sbatch": {"time": 86400}}, 'Write it in quotes: "24:00:00"'),
        ({"sbatch": {"array": "0-3"}}, "array is not the recipe's to set"),
        ({"sbatch": {"depend": "afterok:1"}}, "depend is not the recipe's to set"),
        ({"sbatch": {"--nodes": 2}}, "'--nodes' is no long option"),
        ({"sbatch": {"N": 2}}, "'N' is no long option"),
        ({"sbatch": {"constraint": ["a"]}}, "constraint must be one text"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("setting", [{"backbone.path": "x"}, {"backbone": {"path": "x"}}])
def test_a_backbone_of_its_own_after_an_adaptation_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tune takes what adapt exports"):
        config(adapt={"recipe": "tiny-t5"}, tune=TUNE | {"set": setting})
    assert config(tune=TUNE | {"set": setting}).tune.set == setting


@pytest.mark.parametrize(("name", "stage"), [("demo", "tune"), ("paper-512-512", "adapt")])
def test_a_recipe_of_another_verb_is_recognised(name: str, stage: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("steps: 3\nprompt: {}\n" if stage == "tune" else "steps: 3\ncorpus: [a]\n")
    for recipe in (name, str(own)):
        with pytest.raises(ConfigError, match=f"is a recipe of softprompt .*\n.*\n +{stage}: "):
            load_pipeline(recipe)


def test_a_missing_recipe_names_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'xl-superglue'"):
        load_pipeline("xl-superglu")


@pytest.mark.parametrize(
    "value",
    [3, 1e-5, True, None, "a b", "it's $(touch x) \"quoted\"; 'y'", "two\nlines", "1e3", "é ☃", []]
    + [[1, "a, b"], ["[x]", {"k": "v: w"}]],
)
def test_a_setting_survives_its_way_through_the_command_line(value: Any) -> None:
    (override,) = overrides_of({"values": value})
    assert load_recipe(Anything, None, [override]).values == value


def test_mappings_of_settings_leave_the_other_keys_of_a_section_alone() -> None:
    settings = {"optimizer": {"learning_rate": 0.1, "name": "adamw"}, "batch.micro_batch_size": 2}
    assert overrides_of(settings) == [
        "optimizer.learning_rate=0.1",
        "optimizer.name=adamw",
        "batch.micro_batch_size=2",
    ]


def test_later_options_come_on_top_and_null_takes_one_away() -> None:
    merged = merged_options(
        {"partition": "gpu", "nodes": 2, "exclusive": True}, {"nodes": 4, "partition": None}
    )
    assert merged == {"nodes": "4", "exclusive": ""}


def test_gpus_decide_the_ranks_of_a_node() -> None:
    assert merged_options({"gpus-per-node": 4})["ntasks-per-node"] == "4"
    assert merged_options({"gpus-per-node": "a100:4"})["ntasks-per-node"] == "4"
    both = merged_options({"gpus-per-node": 4, "ntasks-per-node": 2})
    assert tasks_of(both) == (1, 2)
    assert gpus_per_node(both) == 4
    assert gpus_per_node({"gres": "shard:1,gpu:h100:2"}) == 2
    assert tasks_of({"nodes": "2", "ntasks": "6", "ntasks-per-node": "8"}) == (2, 3)
    assert tasks_of({"nodes": "1-4", "ntasks-per-node": "8"}) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:30", 7230),
        ("7-0", 604800),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        (None, None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str | None, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds


def test_the_lead_of_a_warning() -> None:
    assert signal_lead_seconds("B:USR1@300") == 300
    assert signal_lead_seconds("USR1") is None


def test_what_a_script_asks_slurm_for(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2   # EDIT\n#SBATCH -t 60 --exclusive\n# a comment\n\n"
        '#SBATCH --comment="a b"\nset -eu\n#SBATCH --nodes=9\n'
    )
    assert script_options(script) == {
        "nodes": "2",
        "time": "60",
        "exclusive": "",
        "comment": "a b",
    }


def test_scripts_are_the_site_s_own_or_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Pipeline.of(config()).scripts / "sweep.sh").is_file()
    own = tmp_path / "slurm"
    own.mkdir()
    (own / "env.sh").touch()
    assert Pipeline.of(config()).scripts == own
    with pytest.raises(ConfigError, match="scripts is 'mine', but there is no"):
        Pipeline.of(config(scripts="mine"))


def test_a_directory_that_cannot_be_told_to_a_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="line breaks"):
        Pipeline.of(config(directory="a\nb"))


def test_the_command_line_overrides_the_recipe(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, pipeline_values(tmp_path))
    changed = load_pipeline(str(path), ["tune.seeds=[7]", "sbatch.partition=gpu"])
    assert changed.tune.seeds == [7]
    assert changed.sbatch["partition"] == "gpu"
    assert yaml.safe_load(path.read_text())["tune"]["seeds"] == [0, 1]
