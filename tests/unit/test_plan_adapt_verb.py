"""`softprompt plan --stage adapt`: what it says, writes and refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.engine_config import apply_ds_config, engine_config, read_ds_config
from softprompt_dist.backbone.cell import Cluster
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.errors import ConfigError, MachineError
from softprompt_dist.plan import main
from softprompt_dist.planning.adaptation import (
    AdaptationPlan,
    AdaptationQuestion,
    adaptation_plans,
)
from softprompt_dist.planning.adaptation_report import adaptation_ds_config_text
from softprompt_dist.planning.machine import GPUS

XXL = "google/t5-v1_1-xxl"


def ask() -> AdaptationQuestion:
    xxl = known_architecture(XXL)
    assert xxl is not None
    return AdaptationQuestion(xxl, GPUS["a100-80"], Cluster(8), 512, 512, micro_batch=16)


ADAPT = ["--stage", "adapt", "--model", XXL]


def test_the_verb_prints_the_table_and_writes_what_the_engine_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    main([*ADAPT, "--gpus", "8", "--gpu-memory", "80", "--write", str(path)])
    said = capsys.readouterr().out
    assert "4.50 M numbers for 434 matrices" in said
    assert "34.7 TFLOP a row; 7,113 EFLOP in 100,000 steps, 18,093 GPU-hours" in said
    assert re.search(r"^\*  2 +fp32 +layers +none +22\.27 ", said, flags=re.MULTILINE)
    assert re.search(r"^-  1 +fp32 +none .* 72\.40 ", said, flags=re.MULTILINE)
    assert "44.6 GB a checkpoint" in said
    assert "deepspeed --num_gpus 8 -m softprompt_dist.adapt --recipe paper-512-512" in said
    assert "--set engine.activation_checkpointing=true" in said
    values = read_ds_config(path)
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    recipe = apply_ds_config(AdaptConfig(corpus=["text"]), values)
    assert (recipe.engine.zero_stage, recipe.dtype) == (2, "bf16")
    assert recipe.engine.offload_optimizer == "none"


@pytest.mark.parametrize("plan", adaptation_plans(ask()), ids=lambda plan: str(plan.engine))
def test_every_way_has_a_ds_config_that_deepspeed_takes(
    plan: AdaptationPlan, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(adaptation_ds_config_text(plan, ask()))
    values = read_ds_config(path)
    recipe = apply_ds_config(AdaptConfig(corpus=["text"]), values)
    settings = engine_config(recipe, values, world_size=1)
    assert settings["zero_optimization"]["stage"] == plan.engine.stage
    assert (recipe.engine.offload_optimizer == "cpu") == plan.engine.offload


def test_own_rows_and_steps_go_into_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--input-length", "256", "--target-length", "128", "--tokens-per-batch", "65536"]
    main([*ADAPT, "--gpus", "8", "--gpu-memory", "80", *lengths, "--steps", "500", "--mfu", "0.5"])
    said = capsys.readouterr().out
    assert "256 rows of 256 + 128 positions = 8 GPUs x 2 micro-batches x 16 rows" in said
    assert "50 % of 312 TFLOP/s" in said
    for setting in ("inputs_length=256", "targets_length=128", "batch.global_batch_size=256"):
        assert f"--set {setting}" in said
    assert "--steps 500" in said


def test_a_decoder_only_model_has_rows_without_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    seven = ["--stage", "adapt", "--model", "meta-llama/Llama-2-7b-hf", "--gpus", "8"]
    main([*seven, "--target-length", "512"])
    said = capsys.readouterr().out
    assert "rows of 0 + 512 positions" in said
    assert "complementary_pairs" not in said
    for lengths in (["--preset", "paper-512-512"], ["--input-length", "512"]):
        with pytest.raises(ConfigError, match="decoder-only.*Set --target-length only"):
            main([*seven, *lengths])


def test_pairs_are_offered_where_both_sides_are_equally_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    eight = [*ADAPT, "--gpus", "8", "--gpu-memory", "80"]
    main(eight)
    assert "complementary_pairs 1,024 full rows a step carry as many: 3,556 EFLOP" in (
        capsys.readouterr().out
    )
    main([*eight, "--preset", "paper-1024-256"])
    said = capsys.readouterr().out
    assert "4,462 EFLOP" in said
    assert "complementary_pairs fills rows whose two sides are equally long" in said


def test_a_gpu_without_bf16_adapts_in_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--stage", "adapt", "--model", "google/t5-v1_1-small", "--gpu", "v100-32"])
    assert "no ZeRO, fp32" in capsys.readouterr().out


def test_when_nothing_fits_the_numbers_and_a_way_out_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    with pytest.raises(MachineError, match=r"Nothing fits 12 GB .* \d+\.\d GB. Use --gpus \d+"):
        main([*ADAPT, "--gpus", "2", "--gpu-memory", "12", "--write", str(path)])
    assert not path.exists()
    with pytest.raises(MachineError, match=r"Lower --micro-batch to \d+"):
        main([*ADAPT, "--gpus", "8", "--gpu-memory", "40", "--micro-batch", "256"])
    with pytest.raises(MachineError, match="Use a smaller model, or GPUs with more memory"):
        main([*ADAPT, "--gpus", "1", "--gpu-memory", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "adapt", "--prompt-length", "20"], "--prompt-length 20 .* --stage tune"),
        (["--stage", "adapt", "--nvme-path", "/x"], "--nvme-path /x says nothing"),
        (["--mfu", "0.4"], r"--mfu 0.4 says nothing about --stage tune.* --stage adapt"),
        (["--preset", "paper-512-512"], "--preset paper-512-512 .* --stage adapt"),
        (["--stage", "adapt", "--mfu", "1.5"], "above 0 and at most 1"),
        (["--stage", "adapt", "--gpus", "6"], "2048 rows does not go evenly over 6 GPUs"),
        (["--stage", "adapt", "--micro-batch", "3"], "3 does not divide.* Use --micro-batch 2"),
        (
            ["--stage", "adapt", "--preset", "paper-512-512", "--input-length", "8"],
            "sets the lengths of rows",
        ),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--model", XXL, *arguments])
