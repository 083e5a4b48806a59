"""The planner: operations and traffic, the cell it picks, and files that the engine accepts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.engine import apply_engine_config, read_engine_config
from softprompt_dist.backbone.host_memory import host_bytes
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.backbone.memory_model import sharded_bytes
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError, ConfigError, MachineError
from softprompt_dist.plan import main
from softprompt_dist.planning.choose import (
    Plan,
    Question,
    all_plans,
    choose,
    largest_micro_batch,
    make_plan,
)
from softprompt_dist.planning.machine import GPUS, Machine
from softprompt_dist.planning.models import find_architecture
from softprompt_dist.planning.report import ds_config_text
from softprompt_dist.planning.timing import estimate_loading, estimate_step
from softprompt_dist.planning.work import (
    backward_operations,
    forward_operations,
    gather_bytes,
    reduce_bytes,
)

XXL = "google/t5-xxl-lm-adapt"
SEVENTY = "meta-llama/Llama-2-70b-hf"
EIGHT = Cluster(gpus_per_node=8)
SHARDED = Cell("zero3", "bf16")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def known(name: str) -> Architecture:
    found = known_architecture(name)
    assert found is not None
    return found


def ask(
    model: str = XXL, *, gb: float = 40, cluster: Cluster = EIGHT, gpu: str = "a100-40"
) -> Question:
    machine = Machine(GPUS[gpu], cluster)
    return Question(known(model), Workload(), machine, device_bytes=gb * 1e9)


def chosen(question: Question) -> Plan:
    plan = choose(all_plans(question))
    assert plan is not None
    return plan


def held(plan: Plan) -> tuple[str, str, str]:
    return plan.cell.sharding, plan.cell.dtype, plan.cell.quantization


@pytest.mark.parametrize(
    ("work", "teraflop"),
    [
        (Workload(32, 100, 512, 8), 445.8),
        (Workload(32, 1, 512, 8), 372.7),
        (Workload(32, 100, 256, 8), 258.3),
    ],
)
def test_operations_of_a_frozen_xxl_step(work: Workload, teraflop: float) -> None:
    """Arithmetic by hand: 220.5 TFLOP forward and 225.3 backward at 100 + 512 and 8 tokens."""
    xxl = known(XXL)
    total = forward_operations(xxl, work) + backward_operations(xxl, work)
    assert total / 1e12 == pytest.approx(teraflop, rel=2e-3)


def test_operations_of_a_decoder_only_model_are_two_for_each_weight_and_token() -> None:
    seven = known("meta-llama/Llama-2-7b-hf")
    work = Workload(1, 1, 62, 1)
    layers = seven.num_parameters - 2 * seven.embedding_size - seven.small_size
    by_hand = 2 * 64 * layers + 2 * 2 * seven.embedding_size + 32 * 4 * 64**2 * 4096
    assert forward_operations(seven, work) == pytest.approx(by_hand, rel=1e-6)


def test_traffic_of_a_sharded_xxl_step() -> None:
    """At most twice 7/8 of the model: 38.97 GB with the input embedding, which ours leaves out."""
    xxl = known(XXL)
    everything = 2 * 2 * xxl.num_parameters * 7 / 8
    assert everything / 1e9 == pytest.approx(38.97, abs=0.01)
    received = gather_bytes(xxl, SHARDED, EIGHT)
    assert 0.95 * everything < received < everything
    assert gather_bytes(xxl, replace(SHARDED, activation_checkpointing="full"), EIGHT) == received
    int8 = gather_bytes(xxl, replace(SHARDED, quantization="int8"), EIGHT)
    assert int8 == pytest.approx(received / 2, rel=0.02)
    assert gather_bytes(xxl, Cell("replicated", "bf16"), EIGHT) == 0
    assert gather_bytes(xxl, SHARDED, Cluster(1)) == 0


def test_only_the_prompt_is_reduced() -> None:
    assert reduce_bytes(known(XXL), Workload(), EIGHT) == 2 * 100 * 4096 * 4 * 7 / 8
    assert reduce_bytes(known(XXL), Workload(), Cluster(1)) == 0


@pytest.mark.parametrize(
    ("gb", "expected"),
    [
        (80, ("replicated", "bf16", "none")),
        (40, ("replicated", "bf16", "none")),
        (24, ("replicated", "bf16", "int8")),
        (16, ("zero3", "bf16", "none")),
        (11, ("zero3", "bf16", "int8")),
    ],
)
@pytest.mark.parametrize("gpu", ["a100-40", "h100"])
def test_xxl_is_replicated_before_int8_before_sharded(
    gpu: str, gb: float, expected: tuple[str, str, str]
) -> None:
    assert held(chosen(ask(gb=gb, gpu=gpu))) == expected


def test_the_chosen_cell_fits_and_nothing_of_ours_is_much_faster() -> None:
    question = ask(gb=24)
    plan = chosen(question)
    assert plan.memory.total <= question.device_bytes
    own = [p for p in all_plans(question) if p.fits and p.cell.quantization in ("none", "int8")]
    assert plan.step.total <= 1.05 * min(p.step.total for p in own)


def test_four_bits_are_taken_only_where_nothing_else_fits() -> None:
    small_host = replace(ask(gb=15, cluster=Cluster(1)).machine, host_memory_gb=8)
    question = replace(ask(gb=15, cluster=Cluster(1)), machine=small_host)
    with_more_room = replace(question, device_bytes=24e9)
    assert chosen(with_more_room).cell.quantization == "int8"
    only_four_bits = replace(question, device_bytes=9e9)
    assert chosen(only_four_bits).cell.quantization == "nf4"


def test_as_little_as_possible_is_recomputed() -> None:
    question = ask(SEVENTY, gb=40)
    plans = [p for p in all_plans(question) if p.cell == replace(p.cell, quantization="int8")]
    sharded = [p.cell.activation_checkpointing for p in plans if held(p)[0] == "zero3"]
    assert sharded[0] == "none"
    assert re.fullmatch(r"every_\d|full", sharded[1])
    assert chosen(question).fits


def test_a_gpu_without_bf16_is_planned_in_fp32() -> None:
    assert {p.cell.dtype for p in all_plans(ask(gpu="v100-32", gb=32))} == {"fp32"}


def test_shards_stay_within_a_node_where_they_fit() -> None:
    cluster = Cluster(gpus_per_node=4, nodes=2)
    machine = Machine(GPUS["a100-40"], cluster, network_gb_per_second=1.0)
    question = replace(ask(gb=16), machine=machine)
    assert chosen(question).cell.shard_group == "node"
    assert all(p.cell.shard_group == "world" for p in all_plans(ask(gb=16)))


def test_host_memory_is_checked_where_it_is_known() -> None:
    cell = Cell("zero3", "bf16", offload="cpu")
    xxl = known(XXL)
    more = host_bytes(xxl, cell, EIGHT) - host_bytes(xxl, SHARDED, EIGHT)
    assert more == pytest.approx(sharded_bytes(xxl, SHARDED), rel=1e-6)
    roomy = ask(gb=12)
    cramped = replace(roomy, machine=replace(roomy.machine, host_memory_gb=16))
    assert make_plan(roomy, cell).fits
    assert not make_plan(cramped, cell).fits


def test_steps_and_loading_get_slower_with_slower_parts() -> None:
    xxl, fast = known(XXL), Machine(GPUS["a100-40"], EIGHT)
    slow_link = replace(fast, gpu=replace(fast.gpu, link_gb_per_second=20))
    slow_disk = replace(fast, disk_gb_per_second=0.2)
    step, slower = (estimate_step(xxl, SHARDED, Workload(), m) for m in (fast, slow_link))
    assert slower.gather == pytest.approx(step.gather * 235 / 20)
    assert slower.total > slower.gather > step.total > step.compute
    # fp32 on the disk, 44.5 GB; a converted copy of what is sharded is half of it.
    published, converted = (
        estimate_loading(xxl, SHARDED, slow_disk, converted=c) for c in (False, True)
    )
    assert published == pytest.approx(44.54 / 0.2, rel=1e-3)
    assert converted == pytest.approx(published / 2, rel=0.02)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    question = ask()
    most = largest_micro_batch(question, Cell("replicated", "bf16"))
    fits = [
        make_plan(
            replace(question, workload=Workload(micro_batch=n)), Cell("replicated", "bf16")
        ).fits
        for n in (most, most + 1)
    ]
    assert fits == [True, False]
    assert largest_micro_batch(ask(gb=10), Cell("replicated", "bf16")) == 0


@pytest.mark.parametrize(
    "question",
    [
        ask(),
        ask(gb=24),
        ask(gb=11),
        ask(gb=8, cluster=Cluster(gpus_per_node=4, nodes=2)),
        replace(ask(SEVENTY, gb=24), has_nvme=True),
    ],
    ids=["40", "24", "11", "two nodes", "70b"],
)
def test_every_cell_has_a_ds_config_that_the_engine_turns_back_into_it(
    question: Question, tmp_path: Path
) -> None:
    for plan in all_plans(question):
        path = tmp_path / "ds.json"
        path.write_text(ds_config_text(plan.cell, nvme_path="/local"))
        values = read_engine_config(path)
        assert Cell.of(apply_engine_config(BackboneConfig(), values)) == plan.cell


def test_the_verb_prints_every_cell_and_writes_the_chosen_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    main(
        [
            *("--model", XXL, "--gpus", "8", "--gpu-memory", "40", "--prompt-length", "100"),
            *("--input-length", "512", "--micro-batch", "4", "--write", str(path)),
        ]
    )
    said = capsys.readouterr().out
    assert "11,135,332,352 weights" in said
    assert "445.8 TFLOP a step" in said
    assert re.search(r"^\*  replicated +bf16 .* 22\.27 ", said, flags=re.MULTILINE)
    assert re.search(r"^   zero3 +int8/bf16 +cpu ", said, flags=re.MULTILINE)
    assert f"--deepspeed_config {path}" in said
    assert json.loads(path.read_text()) == {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
    }


def test_the_docs_give_what_the_verb_says(capsys: pytest.CaptureFixture[str]) -> None:
    """For the packaged recipes, which have dropout."""
    cells: dict[str, str] = {}
    page = (DOCS / "planning.md").read_text()
    rows = re.findall(r"\| (\d+) GB \| (\S.*) \| ([\d.]+) GB \|", page)
    assert len(rows) == 4
    for memory, cell, needed in rows:
        main(["--model", XXL, "--gpus", "8", "--gpu-memory", memory])
        said = capsys.readouterr().out
        assert "dropout 0.1" in said
        assert f"Chosen: {cell}; {needed} GB of a GPU" in said
        for line in said.splitlines():
            if found := re.match(r"[* ]  (\S+) +(\S+) +none +none +(\S+ +){5}(\d+\.\d\d)", line):
                cells.setdefault(f"{found[1]} {found[2]}", found[4])
    readme = (DOCS.parent / "README.md").read_text().replace("\n", " ")
    for way, cell in (
        ("replicated in bf16", "replicated bf16"),
        ("replicated in int8", "replicated int8/bf16"),
        ("sharded in bf16", "zero3 bf16"),
        ("sharded in int8", "zero3 int8/bf16"),
    ):
        (said,) = re.findall(rf"([\d.]+) GB {way}", readme)
        assert said == f"{float(cells[cell]):.1f}"


def test_when_nothing_fits_the_numbers_and_a_way_out_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    asked = ["--model", SEVENTY, "--gpus", "2", "--gpu-memory", "8", "--write", str(path)]
    with pytest.raises(
        MachineError, match=r"Nothing fits 8 GB per GPU: the least is .* \d+\.\d GB"
    ):
        main([*asked, "--micro-batch", "64"])
    assert not path.exists()
    with pytest.raises(MachineError, match=r"Lower --micro-batch to \d+"):
        main(["--model", XXL, "--gpus", "8", "--gpu-memory", "24", "--micro-batch", "4000"])
    with pytest.raises(MachineError, match=r"Use a smaller model, or GPUs with more memory"):
        main(["--model", SEVENTY, "--gpus", "1", "--gpu-memory", "1"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--gpus", "0"], ConfigError, "'0' must be a whole number of at least 1"),
        (["--micro-batch", "four"], ConfigError, "'four' must be a whole number"),
        (["--gpu-memory", "nan"], ConfigError, "'nan' must be a number above 0"),
        (["--gpu", "a100"], ConfigError, "Did you mean 'a100-40' or 'a100-80'"),
        (["--write", "/no/such/folder/x.json"], ConfigError, "folder that exists"),
        (["--model", "./nowhere"], BackboneError, "no folder './nowhere'"),
        (["--model", "demo:tiny"], BackboneError, "Did you mean 'demo:tiny-t5'"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        main(["--model", XXL, *arguments])


def test_an_unreachable_hub_name_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(BackboneError, match="no network.*Did you mean 'google/t5-v1_1-xxl'"):
        find_architecture("google/t5-v1-xxl")


def test_a_folder_is_read_from_its_config_json(tmp_path: Path) -> None:
    tiny = find_architecture("demo:tiny-t5")
    assert (tiny.d_model, tiny.num_layers, tiny.num_decoder_layers) == (192, 4, 3)
    assert tiny.checkpoint_bytes_per_weight == 2
    with pytest.raises(BackboneError, match="folder with config.json"):
        find_architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BackboneError, match="no JSON object"):
        find_architecture(str(tmp_path))
