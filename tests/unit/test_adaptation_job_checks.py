"""`softprompt doctor --recipe` for recipes of `softprompt adapt`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from softprompt_dist import doctor
from softprompt_dist.checks import adaptation, adaptation_room, job_files, room
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job import Job, check_recipe
from softprompt_dist.checks.world import World
from tests.corpora import TINY_T5, build, tiny_t5, word_tokenizer, write_lines

Found = dict[str, Finding]
Check = Callable[..., Found]

WORLD = World(2, 2, launched=False)
SMALL = {
    "init": "from_config",
    "tokenizer": str(TINY_T5),
    "architecture": {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2},
    "inputs_length": 16,
    "targets_length": 16,
    "steps": 10,
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    build(folder / "built", tiny_t5(), write_lines(folder / "text.txt"))
    return folder / "built"


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., Job]:
    """`job_of(recipe, *options)`: the job of a recipe with these keys."""

    def read(values: dict[str, Any], *options: str) -> Job:
        path = tmp_path / "recipe.yaml"
        keys = {"run_directory": str(tmp_path / "run"), **values}
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        parsed = doctor.build_parser().parse_args(["--recipe", str(path), *options])
        job, (found,) = check_recipe(parsed)
        assert found.status == "ok", found.remedy
        return job

    return read


@pytest.fixture
def check(built: Path, job_of: Callable[..., Job]) -> Check:
    """`check(options, **keys)`: findings about a small recipe, by name."""

    def run(*options: str, world: World = WORLD, **changed: Any) -> Found:
        job = job_of({**SMALL, "corpus": [str(built)], **changed}, *options)
        findings = doctor.job_findings(job, world)
        assert all(finding.remedy for finding in findings if finding.status != "ok")
        assert len({finding.name for finding in findings}) == len(findings)
        return {finding.name: finding for finding in findings}

    return run


def failed(found: Found) -> set[str]:
    return {name for name, finding in found.items() if finding.status == "fail"}


def test_a_good_recipe_is_ok_throughout(check: Check, built: Path) -> None:
    found = check(validation_corpus=[str(built)])
    assert {finding.status for finding in found.values()} == {"ok"}
    assert set(found) == {
        *("batch", "model", "tokenizer", "steps", "engine", "corpus", "validation corpus", "rows"),
        *("room on the host", "room on the disk"),
    }
    assert found["engine"].found == "ZeRO-0, fp32, gradients added up in fp32"
    assert found["corpus"].found.endswith("in 40 documents")
    assert "examples, read about" in found["rows"].found


def test_a_checkpoint_to_start_from_is_looked_at_as_a_whole(check: Check, tiny_t5: Path) -> None:
    start = {"init": "from_checkpoint", "backbone": str(tiny_t5), "corpus": ["README.md"]}
    found = check(**start, tokenizer=None)
    assert failed(found) == set()
    assert {"backbone", "backbone speed", "model"} <= set(found)
    assert found["model"].found.startswith("t5, ")
    found = check(**start, tokenizer=None, objective="lm")
    assert failed(found) == {"model"}
    assert "Set objective to prefix_lm or span_corruption" in found["model"].remedy


def test_a_damaged_checkpoint_fails(check: Check, tiny_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = check(init="from_checkpoint", backbone=str(folder))
    assert str(weights) in found["backbone"].remedy


def test_a_backbone_of_the_hub_is_judged_by_what_is_known_of_it(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_files, "_hub_snapshot", lambda config: None)
    monkeypatch.setattr(job_files, "_on_hub", lambda *named: "on the hub")
    monkeypatch.setattr(room, "host_memory", lambda: (10**9, 10**9))
    monkeypatch.setattr(adaptation_room, "disk_free", lambda folder: 10**9)
    found = check(init="from_checkpoint", backbone="google/t5-v1_1-xxl", tokenizer=None)
    assert failed(found) == {"room on the host", "room on the disk"}
    assert found["backbone"].found == "on the hub"
    assert "rows" not in found, "its tokenizer is not here yet"
    assert "in 40 documents" in found["corpus"].found


def test_text_files_are_counted_and_must_be_there(check: Check, built: Path) -> None:
    text = built.with_name("text.txt")
    found = check(corpus=[f"{text}*3", str(built)])
    assert failed(found) == set()
    assert found["corpus"].found.startswith("1 built, ")
    assert "1 text file(s), 0.0 MB, tokenised before the first step" in found["corpus"].found
    assert found["rows"].found.endswith("not counted here")
    found = check(corpus=["gone.txt"])
    assert failed(found) == {"corpus"}
    assert "gone.txt does not exist" in found["corpus"].remedy


def test_a_corpus_of_another_tokenizer_fails(check: Check, tmp_path: Path) -> None:
    build(tmp_path / "words", word_tokenizer(), write_lines(tmp_path / "w.txt", ["w1 w2 w3"] * 9))
    found = check(corpus=[str(tmp_path / "words")])
    assert failed(found) == {"corpus"}
    assert "was built with tokenizer" in found["corpus"].remedy


def test_a_shard_that_was_cut_fails(check: Check, built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "cut")
    shard = next(folder.glob("*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-2])
    found = check(corpus=[str(folder)], validation_corpus=[str(folder)])
    assert failed(found) == {"corpus", "validation corpus"}
    assert "was cut off" in found["corpus"].remedy


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batch": {"global_batch_size": 4000, "micro_batch_size": 2}}, "Give more text"),
        ({"objective": "span_corruption", "inputs_length": 8}, "Set inputs_length to 10"),
        ({"packing": "complementary_pairs", "targets_length": 8}, "Set both to 16"),
    ],
)
def test_rows_that_cannot_be_made_fail(check: Check, changed: dict[str, Any], told: str) -> None:
    found = check(**changed)
    assert failed(found) == {"rows"}
    assert told in found["rows"].remedy


def test_a_broken_tokenizer_fails(check: Check, tmp_path: Path) -> None:
    found = check(tokenizer=str(tmp_path))
    assert failed(found) == {"model", "tokenizer"}


def test_a_world_that_does_not_divide_the_batch_fails(check: Check) -> None:
    found = check(world=World(3, 3, launched=False))
    assert failed(found) == {"batch"}
    assert "3 ranks x batch.micro_batch_size 2 = 6 must divide it" in found["batch"].remedy


def test_stages_are_checked_one_by_one_and_told_once(
    job_of: Callable[..., Job], check: Check, tiny_t5: Path, tmp_path: Path
) -> None:
    stages = {
        "span": {"objective": "span_corruption", "inputs_length": 32},
        "lm": {"batch": {"global_batch_size": 5}},
    }
    found = check(stages=stages)
    assert failed(found) == {"batch of lm"}
    assert {"corpus", "batch of span", "rows of span", "rows of lm"} <= set(found)
    assert "backbone" not in found, "the second stage's is not there yet"

    job = job_of({**SMALL, "corpus": ["a.txt"], "stages": stages}, "--stage", "lm")
    assert [Path(str(stage.run_directory)).name for stage in job.stages] == ["lm"]
    assert "does not exist" in adaptation.check_adaptation(job, WORLD)[0].remedy
    shutil.copytree(tiny_t5, tmp_path / "run" / "span" / "export")
    assert adaptation.check_adaptation(job, WORLD)[0].status == "ok"


def test_a_ds_config_decides_stage_and_dtype(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    options = ("--deepspeed_config", str(path))
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    found = check(*options, world=World(1, 1, launched=False))
    assert found["engine"].status == "warn"
    assert found["engine"].found == "ZeRO-1, bf16, gradients added up in bf16"
    assert check(*options)["engine"].status == "ok", "one micro-batch a step is no sum"
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": offload}))
    told = "ZeRO-2, bf16, gradients added up in fp32, optimizer in the node's memory"
    assert check(*options)["engine"].found == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optimizer": {"type": "Adam"}}, "belongs to the recipe"),
        ({"fp16": {"enabled": True}}, "Use bf16"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "stage 1, 2"),
    ],
)
def test_a_ds_config_that_cannot_be_fails(
    values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    engine = tmp_path / "ds.json"
    engine.write_text(json.dumps(values))
    preset = ["--recipe", "paper-512-512", "--set", "backbone=t5", "--set", "corpus=[text.txt]"]
    options = doctor.build_parser().parse_args([*preset, "--deepspeed_config", str(engine)])
    _, (found,) = check_recipe(options)
    assert (found.name, found.status) == ("recipe", "fail")
    assert told in found.remedy


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(10**12, 10**12, "ok"), (10**3, 10**12, "warn"), (10**3, 10**3, "fail")],
)
def test_memory_that_is_too_small_fails(
    free: int, total: int, status: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "host_memory", lambda: (free, total))
    monkeypatch.setattr(room, "gpu_memory", lambda: (free, total))
    found = check()
    assert found["room on the host"].status == status
    monkeypatch.setattr(adaptation_room, "on_gpu", lambda: True)
    found = check()
    assert found["room on the GPU"].status == status
    assert found["room on the host"].status == status, "the copy that checkpoints are written from"
    found = check(checkpoint={"background": False})
    assert "room on the host" not in found
    if status == "fail":
        assert "softprompt plan --stage adapt --gpus 2" in found["room on the GPU"].remedy
    offloaded = {"zero_stage": 2, "offload_optimizer": "cpu"}
    assert check(engine=offloaded)["room on the host"].status == status


def test_the_disk_must_hold_checkpoints_and_exports(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(adaptation_room, "disk_free", lambda folder: 0)
    kept = {"every_steps": 1, "keep_last": 2}
    exports = {"steps": [3, 5], "dtypes": ["fp32", "bf16"]}
    said = check(checkpoint=kept, export=exports)["room on the disk"]
    assert said.status == "fail"
    # Two kept, one being written, those of steps 3 and 5.
    assert said.found.startswith("5 checkpoint(s) and 6 export(s) at most")
    said = check(checkpoint={"every_steps": 100})["room on the disk"]
    assert said.found.startswith("1 checkpoint(s) and 1 export(s) at most")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(10**7))
    assert check()["room on the disk"].status == "ok", "what is written needs no room"


def test_what_is_done_and_what_is_in_the_way_is_told(check: Check, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert check()["steps"].found == "0 of 10 done"
    (run / "export").mkdir(parents=True)
    (run / "export" / "config.json").write_text("{}")
    found = check()
    assert failed(found) == {"steps"}
    assert "is not empty" in found["steps"].remedy
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert check()["steps"].found.startswith("10 of 10 done")
    found = check(steps=9)
    assert failed(found) == {"steps"}
    assert "has done 10 already. Raise steps" in found["steps"].remedy
