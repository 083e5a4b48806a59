"""`softprompt slurm render`: the exact commands, and what they give each job."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from softprompt_dist.adapt_stages import load_stages
from softprompt_dist.adaptation import exporting
from softprompt_dist.scheduling.batch_job import job_environment, ranges, shell_lines
from softprompt_dist.scheduling.pipeline_recipe import load_pipeline
from softprompt_dist.scheduling.recipe_checks import check_recipes
from softprompt_dist.scheduling.stages import Pipeline, jobs_of
from softprompt_dist.slurm import main
from softprompt_dist.task_config import SourceConfig
from tests.pipelines import FakeSlurm, changed_stage, option, pipeline_values, write_pipeline


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "programs")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def pipeline_of(folder: Path, **changes: Any) -> Pipeline:
    return Pipeline.of(
        load_pipeline(str(write_pipeline(folder, pipeline_values(folder, **changes))))
    )


def test_the_commands_are_those_that_would_be_submitted(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path, pipeline_values(tmp_path))
    main(["render", str(path)])
    said = capsys.readouterr().out
    assert "No check failed; no warnings." in said
    blocks = said.replace("\\\n", " ").split("# ")[1:4]
    rendered = [shlex.split(block.splitlines()[1]) for block in blocks]
    main(["pipeline", str(path)])
    assert len(slurm.submitted) == 3
    for words, job in zip(rendered, slurm.submitted, strict=True):
        first = words.index("sbatch")
        given = [
            word.replace("ADAPT_JOB", "101").replace("TUNE_JOB", "102")
            for word in words[first + 1 :]
        ]
        assert given == job["words"]
        assignments = dict(word.split("=", 1) for word in words[:first])
        assert assignments.items() <= job["environment"].items()


def test_each_stage_gets_what_its_script_reads(tmp_path: Path) -> None:
    pipeline = pipeline_of(tmp_path)
    adapt, tune, evaluate = jobs_of(pipeline, check_recipes(pipeline).stages)
    folder = tmp_path / "pipeline"
    common = {"SOFTPROMPT_SLURM": str(pipeline.scripts)}
    sweep = {"SWEEP_DIR": str(folder / "tune"), "TASKS": "boolq cb", "SEEDS": "0 1"}
    assert adapt.environment == common | {
        "RECIPE": str(tmp_path / "adapt.yaml"),
        "RUN_DIR": str(folder / "adapt"),
    }
    assert tune.environment == common | sweep | {
        "RECIPE": str(tmp_path / "tune.yaml"),
        "SWEEP_VERB": "train",
        "SOFTPROMPT_AFTER": f"{folder / 'adapt'}:20",
    }
    assert evaluate.environment == common | sweep | {"SWEEP_VERB": "evaluate"}
    export = folder / "adapt" / exporting.LAST
    assert f"backbone.path={export}" in tune.arguments
    assert evaluate.arguments[-2:] == ("--split", "validation")
    assert [part.directory for part in evaluate.parts] == [
        folder / "tune" / name / "evaluation"
        for name in ("boolq-seed0", "boolq-seed1", "cb-seed0", "cb-seed1")
    ]
    words = tune.command(tune.parts, ["7", "8_1"])
    assert option(words, "dependency") == "afterok:7:8_1"
    assert "--kill-on-invalid-dep=yes" in words
    assert option(words, "array") == "0-3%2"
    assert option(words, "output") == str(folder / "logs" / "tune-%A-%a.log")
    assert option(words, "ntasks-per-node") == "2"
    assert option(tune.command(tune.parts[1:]), "array") == "1-3%2"


def test_an_engine_is_the_stage_s_or_none(tmp_path: Path) -> None:
    """The scripts have a default of their own, which must not come into a recipe by the way."""
    engine = tmp_path / "engine.json"
    engine.write_text('{"zero_optimization": {"stage": 0}}')
    own = changed_stage(tmp_path, "tune", deepspeed_config=str(engine))
    pipeline = pipeline_of(tmp_path, tune=own)
    adapt, tune, _ = jobs_of(pipeline, check_recipes(pipeline).stages)
    assert tune.environment["DS_CONFIG"] == str(engine)
    assert "--deepspeed_config" not in tune.arguments
    assert "DS_CONFIG" not in adapt.environment
    assert adapt.arguments[1:3] == ("--deepspeed_config", "")


def test_the_export_of_several_stages_is_the_last_one_s(tmp_path: Path) -> None:
    pipeline_values(tmp_path)
    recipe = yaml.safe_load((tmp_path / "adapt.yaml").read_text())
    recipe |= {"stages": {"span": {"objective": "span_corruption"}, "lm": {"steps": 7}}}
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    pipeline = pipeline_of(tmp_path, adapt={"recipe": str(path)})
    _, tune, _ = jobs_of(pipeline, check_recipes(pipeline).stages)
    folder = pipeline.directory / "adapt"
    assert f"backbone.path={folder / 'lm' / 'export'}" in tune.arguments
    assert tune.environment["SOFTPROMPT_AFTER"] == f"{folder}:27"  # DONE counts all stages' steps


@pytest.mark.parametrize("name", ["export", "export-bf16", "export-step-00000004-bf16"])
def test_an_export_by_name_is_one_that_the_adaptation_writes(name: str, tmp_path: Path) -> None:
    adapt = changed_stage(
        tmp_path, "adapt", set={"export": {"steps": [4], "dtypes": ["fp32", "bf16"]}}
    )
    pipeline = pipeline_of(tmp_path, adapt=adapt, tune=changed_stage(tmp_path, "tune", export=name))
    recipes = check_recipes(pipeline)
    assert recipes.are_right
    (config,) = load_stages(adapt["recipe"], ["export={steps: [4], dtypes: [fp32, bf16]}"])
    step = 4 if "step" in name else config.steps
    written = {
        target.name
        for target, _ in exporting._targets(exporting.folder_of(tmp_path, config, step), config)
    }
    assert name in written
    other = pipeline_of(tmp_path, tune=changed_stage(tmp_path, "tune", export="export-bf16"))
    assert "but small leaves export." in check_recipes(other).findings[-1].remedy


def test_each_task_reads_its_own_rows(tmp_path: Path) -> None:
    """The packaged recipe names BoolQ's, at a revision and with splits of its own."""
    tune = {"recipe": "t5-xxl-superglue-boolq", "tasks": ["boolq", "cb"]}

    def source(**changes: Any) -> SourceConfig:
        pipeline = pipeline_of(tmp_path, tune=tune | changes)
        recipes = check_recipes(pipeline)
        assert recipes.tune is not None, recipes.findings
        assert recipes.tune.config is not None
        return recipes.tune.config.task.source

    assert source() == SourceConfig(kind="hub")
    assert source(tasks=["boolq"]).subset == "boolq"
    zips = {"task.source": {"kind": "superglue", "path": "zips"}}
    assert source(set=zips) == SourceConfig(kind="superglue", path="zips")


def test_the_user_s_environment_goes_along_but_for_another_job_s_settings() -> None:
    user = {
        "PATH": "p",
        "SBATCH_ACCOUNT": "mine",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_ARRAY_INX": "0-9",
        "SLURM_CONF": "conf",
        "SLURM_JOB_ID": "3",
        "SLURM_MEM_PER_CPU": "1",
        "DS_CONFIG": "left.json",
        "SOFTPROMPT_SCRATCH": "/local",
    }
    assert job_environment(user, {"RECIPE": "r"}) == {
        "PATH": "p",
        "SBATCH_ACCOUNT": "mine",
        "SLURM_CONF": "conf",
        "SOFTPROMPT_SCRATCH": "/local",
        "RECIPE": "r",
    }


def test_ranges_and_lines() -> None:
    assert ranges([5, 0, 2, 1, 9, 8]) == "0-2,5,8-9"
    words = ["sbatch", "--parsable", "a b", "--", "--set", "x=$(y)"]
    text = "\n".join(shell_lines({"NAME": "it's"}, words))
    assert shlex.split(text.replace("\\\n", "")) == ["NAME=it's", *words]
