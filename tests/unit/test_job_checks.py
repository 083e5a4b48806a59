"""What a recipe asks for, against what is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from softprompt_dist import doctor
from softprompt_dist.checks import job_files, room
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.job import Job, check_recipe, check_world_size
from softprompt_dist.checks.world import World
from softprompt_dist.config import BackboneConfig, TuneConfig
from softprompt_dist.data.sources import HubNames
from softprompt_dist.recipe import load_recipe
from softprompt_dist.task_config import MixtureConfig, SourceConfig, TaskConfig, TransferConfig


def read(*arguments: str) -> tuple[Job, list[Finding]]:
    return check_recipe(doctor.build_parser().parse_args(list(arguments)))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert all(finding.remedy for finding in findings if finding.status != "ok")
    return {finding.name: finding for finding in findings}


@pytest.fixture
def config(tiny_recipe: Path) -> TuneConfig:
    return load_recipe(TuneConfig, tiny_recipe)


def test_without_a_recipe_nothing_is_asked_for() -> None:
    job, findings = read("--run-dir", "somewhere")
    assert (job, findings) == (Job(Path("somewhere")), [])
    assert job.may_use_bf16
    assert doctor.job_findings(job, World(2, 2, launched=False)) == []


def test_a_good_recipe_is_ok_throughout(tiny_recipe: Path) -> None:
    job, findings = read("--recipe", str(tiny_recipe))
    found = by_name(findings + doctor.job_findings(job, World(2, 2, launched=False)))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert {"recipe", "batch", "task", "backbone", "tokenizer", "room on the host"} <= found.keys()
    assert job.run_directory == Path("runs/tiny")
    assert found["task"].found == "150 training, 21 validation, 21 test rows"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "dmeo"], "Did you mean 'demo'?"),
        (["--recipe", "demo", "--set", "batch.nope=1"], "Unknown key 'batch.nope'"),
        (
            ["--recipe", "demo", "--deepspeed_config", "none.json"],
            "Cannot read ds_config none.json",
        ),
        (["--set", "batch.micro_batch_size=1"], "give --recipe"),
        (["--recipe", "paper-512-512"], "corpus is missing"),
        (["--recipe", "paper-512-512", "--set", "corpus=[text]"], "`backbone` must name"),
        (["--recipe", "demo", "--stage", "lm"], "demo has no stages"),
        (["--stage", "lm"], "give --recipe"),
    ],
)
def test_a_bad_recipe_fails_with_its_own_words(arguments: list[str], told: str) -> None:
    _, (found,) = read(*arguments)
    assert (found.name, found.status) == ("recipe", "fail")
    assert told in found.remedy


def test_ds_config_and_overrides_count(tiny_recipe: Path, tmp_path: Path) -> None:
    engine = tmp_path / "bf16.json"
    engine.write_text('{"bf16": {"enabled": true}}')
    assert not read("--recipe", str(tiny_recipe))[0].may_use_bf16
    assert read("--recipe", str(tiny_recipe), "--deepspeed_config", str(engine))[0].may_use_bf16
    job, _ = read("--recipe", str(tiny_recipe), "--set", "backbone.quantization=nf4")
    assert job.needs_bitsandbytes_for == "backbone.quantization=nf4"
    job, _ = read(
        *["--recipe", str(tiny_recipe), "--set", "backbone.sharding=zero3"],
        *["--set", "backbone.offload=nvme", "--set", f"backbone.offload_path={tmp_path}"],
    )
    assert job.offload_folder == tmp_path
    assert job.needs_bitsandbytes_for is None


@pytest.mark.parametrize(
    ("settings", "on_one_rank", "on_two"),
    [
        ([], False, False),
        (["backbone.sharding=zero3"], False, True),
        (["backbone.sharding=zero3", "backbone.offload=cpu"], True, True),
    ],
    ids=["replicated", "zero3", "off-loaded"],
)
def test_deepspeed_is_needed_where_weights_are_cut_or_moved(
    settings: list[str], on_one_rank: bool, on_two: bool, tiny_recipe: Path, zero3_json: Path
) -> None:
    overrides = [word for setting in settings for word in ("--set", setting)]
    job, _ = read("--recipe", str(tiny_recipe), *overrides)
    assert (job.needs_deepspeed(1), job.needs_deepspeed(2)) == (on_one_rank, on_two)
    engine = ["--deepspeed_config", str(zero3_json)]
    assert read("--recipe", str(tiny_recipe), *overrides, *engine)[0].needs_deepspeed(1)


def test_a_world_that_does_not_divide_the_batch_fails(config: TuneConfig) -> None:
    job = Job(Path("runs"), config)
    assert check_world_size(job, 2)[0].status == "ok"
    (found,) = check_world_size(job, 3)
    assert found.status == "fail"
    assert "3 ranks x batch.micro_batch_size 4 = 12 must divide it" in found.remedy


def test_an_incomplete_backbone_fails(tiny_t5: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(tiny_t5, folder)
    config = BackboneConfig(path=str(folder))
    whole = by_name(job_files.check_backbone_files(folder, config))
    assert {finding.status for finding in whole.values()} == {"ok"}

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, weights)
    found = by_name(job_files.check_backbone_files(folder, config))
    assert "lm_head.weight" in found["backbone"].remedy

    weights.write_bytes(weights.read_bytes()[:-100])
    found = by_name(job_files.check_backbone_files(folder, config))
    assert (found["backbone"].status, found["tokenizer"].status) == ("fail", "ok")
    assert str(weights) in found["backbone"].remedy

    (folder / "tokenizer.json").unlink()
    found = by_name(job_files.check_backbone_files(folder, config))
    assert found["tokenizer"].status == "fail"


def test_a_backbone_that_is_nowhere_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (found,) = job_files.find_backbone(BackboneConfig(path="/no/such/folder"))
    assert folder is None
    assert "does not exist" in found.remedy

    def unreachable(*given: object, **named: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "repo_info", unreachable)
    _, (found,) = job_files.find_backbone(BackboneConfig(path="nobody/nothing"))
    assert found.status == "fail"
    assert "(Name or service not known)" in found.remedy
    monkeypatch.setattr(HfApi, "repo_info", lambda *given, **named: None)
    folder, (found,) = job_files.find_backbone(BackboneConfig(path="nobody/nothing"))
    assert (folder, found.status) == (None, "ok")


def test_demo_backbones_are_found_or_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    folder, findings = job_files.find_backbone(BackboneConfig(path="demo:smollm2-135m"))
    assert folder is None
    assert "fetched when a run first starts" in findings[0].found
    converted = tmp_path / "backbones" / "smollm2-135m-fp32"
    converted.mkdir(parents=True)
    (converted / "config.json").write_text("{}")
    assert job_files.find_backbone(BackboneConfig(path="demo:smollm2-135m")) == (converted, [])
    _, (found,) = job_files.find_backbone(BackboneConfig(path="demo:tiny-t6"))
    assert found.status == "fail"


def test_rows_are_read_as_the_run_would_read_them(config: TuneConfig, tmp_path: Path) -> None:
    source = config.task.source.model_copy(update={"test": str(tmp_path / "gone.jsonl")})
    missing = job_files.check_task(config.task.model_copy(update={"source": source}))
    assert (missing.status, "gone.jsonl" in missing.remedy) == ("fail", True)
    labels = {"apple": "fruit"}
    wrong = job_files.check_task(config.task.model_copy(update={"labels": labels}))
    assert wrong.status == "fail"
    assert "which is not in task.labels" in wrong.remedy


def test_a_task_of_the_catalogue_is_looked_up_where_it_would_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def on_hub(names: HubNames) -> str:
        asked.append((names.data_set, names.revision))
        return "on the hub"

    monkeypatch.setattr(job_files, "_dataset", on_hub)
    assert job_files.check_task(TaskConfig(catalogue="trec")).found == "on the hub"
    assert asked == [("CogComp/trec", "refs/convert/parquet")]
    row = '{"question": "is it", "passage": "It is.", "label": true}\n'
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    source = SourceConfig(kind="superglue", path=str(tmp_path))
    found = job_files.check_task(TaskConfig(catalogue="boolq", source=source))
    assert found.found == "1 training, 1 validation, 1 test rows"
    (tmp_path / "test.jsonl").write_text(row.replace(', "label": true', ""))
    refused = job_files.check_task(TaskConfig(catalogue="boolq", source=source))
    assert (refused.status, "has no labels" in refused.remedy) == ("fail", True)


def test_tasks_of_mixture_and_transfer_are_checked_too(config: TuneConfig, tmp_path: Path) -> None:
    source = config.task.source.model_copy(update={"test": str(tmp_path / "gone.jsonl")})
    mixed = config.task.model_copy(update={"name": "mixed"})
    scored = config.task.model_copy(update={"name": "scored", "source": source})
    both = config.model_copy(
        update={
            "mixture": MixtureConfig(tasks=[mixed]),
            "transfer": [TransferConfig(task=scored)],
        }
    )
    found = by_name(job_files.check_files(both))
    assert found["task"].status == found["task mixed"].status == "ok"
    assert (found["task scored"].status, "gone.jsonl" in found["task scored"].remedy) == (
        "fail",
        True,
    )


def test_a_prompt_file_that_is_none_fails(config: TuneConfig, tmp_path: Path) -> None:
    assert job_files.check_prompt(config.prompt) == []
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(b"no prompt")
    prompt = config.prompt.model_copy(update={"initialisation": "file", "file": str(path)})
    assert by_name(job_files.check_prompt(prompt))["prompt file"].status == "fail"


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(10**12, 10**12, "ok"), (10**6, 10**12, "warn"), (10**6, 10**6, "fail")],
)
def test_a_memory_that_is_too_small_fails(
    free: int, total: int, status: str, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(TuneConfig, tiny_recipe)
    folder, cluster = Path(config.backbone.path), World(2, 2, launched=False).cluster
    monkeypatch.setattr(room, "host_memory", lambda: (free, total))
    monkeypatch.setattr(room, "gpu_memory", lambda: (free, total))
    found = by_name(room.check_room(config, folder, cluster))
    assert {name: finding.status for name, finding in found.items()} == {"room on the host": status}
    monkeypatch.setattr(room, "on_gpu", lambda: True)
    found = by_name(room.check_room(config, folder, cluster))
    assert found["room on the GPU"].status == status
    if status == "fail":
        assert "softprompt plan --model" in found["room on the GPU"].remedy
