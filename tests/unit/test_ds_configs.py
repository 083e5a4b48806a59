from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist import plan
from softprompt_dist.adapt_stages import load_stages
from softprompt_dist.adaptation.engine_config import (
    apply_ds_config,
    gradient_sums,
    read_ds_config,
)
from softprompt_dist.backbone.engine import (
    BlockSizes,
    apply_engine_config,
    engine_config,
    read_engine_config,
)
from softprompt_dist.config import BackboneConfig, TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import load_recipe, recipe_names

FOLDER = Path(__file__).parents[2] / "ds_configs"
CELLS = {
    "replicated_bf16": ("replicated", "bf16", "none", "none"),
    "replicated_int8": ("replicated", "bf16", "llm_int8", "none"),
    "zero3_bf16": ("zero3", "bf16", "none", "none"),
    "zero3_int8": ("zero3", "bf16", "int8", "none"),
    "zero3_offload_cpu": ("zero3", "bf16", "none", "cpu"),
    "zero3_offload_nvme": ("zero3", "bf16", "none", "nvme"),
    "zero3_fp32": ("zero3", "fp32", "none", "none"),
    "zero0_debug": ("replicated", "fp32", "none", "none"),
}
FOR_ADAPTATION = {"adapt_zero2_bf16"}


def dotted_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_each_file_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*CELLS, *FOR_ADAPTATION}
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.json`" in readme for name in {*CELLS, *FOR_ADAPTATION})


@pytest.mark.parametrize("name", CELLS)
def test_each_file_is_plumbing_that_gives_its_cell(name: str) -> None:
    values = read_engine_config(FOLDER / f"{name}.json")
    backbone = apply_engine_config(BackboneConfig(), values)
    cell = (backbone.sharding, backbone.dtype, backbone.quantization, backbone.offload)
    assert cell == CELLS[name]


def test_the_file_for_adaptation_is_that_of_the_largest_model_on_one_node(tmp_path: Path) -> None:
    path = FOLDER / "adapt_zero2_bf16.json"
    asked = ["--stage", "adapt", "--model", "google/t5-v1_1-xxl", "--gpus", "8"]
    plan.main([*asked, "--gpu-memory", "80", "--write", str(tmp_path / "written.json")])
    values = read_ds_config(path)
    assert values == json.loads((tmp_path / "written.json").read_text())
    preset = load_stages("paper-512-512", ["backbone=t5", "corpus=[text]", "dtype=fp32"])
    config = apply_ds_config(preset[0], values)
    assert (config.engine.zero_stage, config.dtype) == (2, "bf16")
    assert gradient_sums(config, values) == "fp32"


@pytest.mark.parametrize("gpu", ["a100-40", "a100-80", "h100"])
def test_what_is_started_for_xxl_is_what_the_planner_takes(gpu: str, tmp_path: Path) -> None:
    asked = ["--model", "google/t5-xxl-lm-adapt", "--gpus", "8", "--gpu", gpu]
    plan.main([*asked, "--write", str(tmp_path / "written.json")])
    planned = json.loads((tmp_path / "written.json").read_text())
    for script in ("train_xxl", "evaluate_xxl", "sweep"):
        text = (FOLDER.parent / "slurm" / f"{script}.sh").read_text()
        (started,) = re.findall(r"\$\{DS_CONFIG:-(.+?)\}", text)
        assert json.loads((FOLDER.parent / started).read_text()) == planned
    recipes = [name for name in recipe_names() if name.startswith("t5-xxl")]
    assert len(recipes) == 3
    for name in recipes:
        backbone = load_recipe(TuneConfig, name).backbone
        assert apply_engine_config(backbone, planned) == backbone


@pytest.mark.parametrize("name", [*CELLS, *FOR_ADAPTATION])
def test_deepspeed_knows_each_key_and_the_readme_explains_it(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = json.loads((FOLDER / f"{name}.json").read_text())
    zero = DeepSpeedZeroConfig(**values["zero_optimization"])
    assert zero.stage == values["zero_optimization"]["stage"]
    assert not zero.model_extra
    readme = (FOLDER / "README.md").read_text()
    assert [key for key in dotted_keys(values) if f"`{key}`" not in readme] == []


@pytest.fixture
def applied(tmp_path: Path) -> Callable[..., BackboneConfig]:
    """`applied(values, **recipe)`: the backbone section once a ds_config has had its say."""

    def read_and_apply(values: Any, **recipe: Any) -> BackboneConfig:
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(values))
        return apply_engine_config(BackboneConfig(**recipe), read_engine_config(path))

    return read_and_apply


ZERO3 = {"zero_optimization": {"stage": 3}}
WRONG: dict[str, tuple[Any, str]] = {
    "own key misspelt": (
        {**ZERO3, "softprompt": {"quantisation": "int8"}},
        r"ds_config\.json.*softprompt\.quantisation.*Did you mean 'quantization'\?.*Known:",
    ),
    "own key of the recipe alone": (
        {**ZERO3, "softprompt": {"max_input_tokens": 3}},
        r"softprompt\.max_input_tokens.*unknown.*Known: quantization, quantized_layers",
    ),
    "own value": (
        {**ZERO3, "softprompt": {"quantization": "int4"}},
        r"quantization is 'int4': .*'none', 'int8', 'llm_int8' or 'nf4'",
    ),
    "own section": ({**ZERO3, "softprompt": "int8"}, r"sets 'softprompt' to 'int8'.*an object"),
    "whole on every rank": (
        {**ZERO3, "softprompt": {"quantization": "nf4"}},
        r"quantization is 'nf4'.*sharding is 'zero3'.*Set quantization=int8, or sharding=rep",
    ),
    "off-load without parts": (
        {"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}},
        r"offload is 'cpu'.*sharding is 'replicated'.*Set sharding=zero3, or offload=none",
    ),
    "off-load to nowhere": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
        r"offload is 'disk': .*'none', 'cpu' or 'nvme'",
    ),
    "nvme without a path": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        r"offload is 'nvme' and offload_path is None; a path goes with nvme",
    ),
    "off-load that is no object": (
        {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
        r"sets 'zero_optimization\.offload_param' to 'cpu'.*an object",
    ),
    "a section misspelt": (
        {"zero_optimisation": {"stage": 3}},
        r"sets 'zero_optimisation', which is unknown\. Did you mean 'zero_optimization'\?",
    ),
    "a truth in quotes": (
        {**ZERO3, "bf16": {"enabled": "false"}},
        r"sets 'bf16' to .*'false'.*must be",
    ),
    "a switch misspelt": ({**ZERO3, "bf16": {"enable": True}}, r"sets 'bf16' to .*must be"),
    "bytes quantized once more": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        r"zero_quantized_weights.*bytes for numbers.*softprompt\.quantization",
    ),
    "a stage in quotes": (
        {"zero_optimization": {"stage": "3"}},
        r"zero_optimization\.stage to \"3\"; it must be a number",
    ),
    "stage 2": ({"zero_optimization": {"stage": 2}}, r"ZeRO stage 2.*Use 3 .* or 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_with_value_rule_and_remedy(
    case: str, applied: Callable[..., BackboneConfig]
) -> None:
    values, said = WRONG[case]
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        applied(values)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"offload": "cpu"}, r"offload is 'cpu'.*sharding is 'replicated'"),
        ({"shard_group": "node"}, r"shard_group is 'node', but sharding is 'replicated'"),
    ],
)
def test_a_ds_config_that_takes_the_ground_from_the_recipe_is_refused(
    recipe: dict[str, Any], said: str, applied: Callable[..., BackboneConfig]
) -> None:
    assert applied(ZERO3, **recipe).sharding == "zero3"
    with pytest.raises(ConfigError, match=f"ds_config and recipe together: {said}"):
        applied({"zero_optimization": {"stage": 0}}, **recipe)


def test_own_settings_reach_the_backbone_and_not_deepspeed(
    applied: Callable[..., BackboneConfig],
) -> None:
    own = {"quantization": "int8", "quantized_layers": "blocks_without_wo", "shard_group": "node"}
    values = {**ZERO3, "softprompt": {**own, "activation_checkpointing": "every_3"}}
    backbone = applied(values, quantization="none")
    chosen = backbone.model_dump(include={*own, "activation_checkpointing"})
    assert chosen == values["softprompt"]
    assert "softprompt" not in engine_config(backbone, values, SIZES)


SIZES = BlockSizes(largest_repeated=64, head=64, num_parts=2)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            {"stage3_prefetch_bucketsize": 1},
            "stage3_prefetch_bucketsize is 1.*'stage3_prefetch_bucket_size'",
        ),
        ({"stage3_max_live_parameters": "many"}, "stage3_max_live_parameters is 'many'.*integer"),
        ({"offload_param": {"bufer_size": 1}}, r"offload_param\.bufer_size is 1.*not permitted"),
    ],
)
def test_what_deepspeed_does_not_know_is_a_message(setting: dict[str, Any], said: str) -> None:
    values = {"zero_optimization": {"stage": 3, **setting}}
    with pytest.raises(ConfigError, match=rf"DeepSpeed refuses\n  - zero_optimization\.{said}"):
        engine_config(BackboneConfig(), values, SIZES)
