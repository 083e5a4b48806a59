"""Names from somebody who means harm are refused everywhere, by one rule; nothing is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from softprompt_dist import train
from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import load_stages
from softprompt_dist.backbone.weight_files import checkpoint_files
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.lm.manifest import ShardRecord
from softprompt_dist.durable import digest_of
from softprompt_dist.errors import BackboneError, ConfigError, MachineError
from softprompt_dist.names import NAME, is_name, name_of, path_inside
from softprompt_dist.recipe import check_values
from softprompt_dist.run.checkpoint_format import (
    MANIFEST,
    TUNING,
    InvalidCheckpointError,
    encode_manifest,
    read_manifest,
)
from tests.messages import Said, assert_message

EVIL_NAMES = [
    "../x", "..", ".", "", "/tmp/x", "a/b", "a\\b", ";rm -rf x", "$(touch x)", "`touch x`", "a b",
    "a\nb", "run\n", "a\0b", "-rf", ".hidden", "é", "a" * 65, "a|b", "a&b", "~", "a*", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_names_that_are_none_are_refused_everywhere(tmp_path: Path, name: str) -> None:
    assert not is_name(name)
    for kind in (TuneConfig, AdaptConfig):
        with pytest.raises(ConfigError, match="begins with a letter or a digit|valid string"):
            check_values(kind, {"name": name})
    stages = {"corpus": ["a"], "backbone": "x", "stages": {name: {}}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(stages))
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_stages(str(recipe))
    recipe.write_text(yaml.safe_dump(stages | {"name": name, "stages": {"one": {}}}))
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_stages(str(recipe))
    with pytest.raises(ValueError, match="name"):
        ShardRecord(
            name=name, tokens_sha256="", offsets_sha256="", documents=1, tokens=1, text_bytes=1,
            empty_documents=0, bad_rows=0,
        )  # fmt: skip
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BackboneError, match=r"index\.json"):
        checkpoint_files(tmp_path)
    with pytest.raises(MachineError, match=str(tmp_path)):
        path_inside(tmp_path, name, error=MachineError)


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "step-00000020"
    folder.mkdir()
    (folder / MANIFEST).write_bytes(encode_manifest(20, {name: digest_of(b"")}))
    with pytest.raises(InvalidCheckpointError, match="no name of a file in it|half|nested|surrog"):
        read_manifest(folder, TUNING)


@pytest.mark.drill("D34")
def test_a_name_in_a_recipe_runs_nothing_and_writes_nothing(
    said: Said, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("../../x", "$(touch x)", ";touch x", "'a\\nb'"):
        outcome = said(train.main, "--recipe", tiny_recipe, "--set", f"name={name}")
        assert_message(outcome, "name: ", "begins with a letter or a digit")
    assert [*tmp_path.rglob("*")] == [folder]


@pytest.mark.parametrize("label", ["../../x", "a/b", "$(touch x)", "é", "..", "x" * 200, "- -"])
def test_results_of_any_task_lie_in_the_run_directory(tmp_path: Path, label: str) -> None:
    config = check_values(TuneConfig, {"task": {"name": label}})
    name = f"{name_of(config.task.name)}-validation"
    assert NAME.fullmatch(name)
    assert path_inside(tmp_path, "tasks", name, error=MachineError).is_relative_to(tmp_path)


@pytest.mark.parametrize("label", ["a\nb", "\x1b[2J", "", "x" * 201, "a\u202eb"])
def test_labels_that_would_confuse_a_reader_are_refused(label: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.name"):
        check_values(TuneConfig, {"task": {"name": label}})


@pytest.mark.drill("D34")
def test_links_do_not_lead_out_of_a_run_directory(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (run / "one").symlink_to(outside)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"corpus": ["a"], "backbone": "x", "stages": {"one": {}}}))
    with pytest.raises(ConfigError, match="one is a symbolic link"):
        load_stages(str(recipe), run_directory=str(run))
