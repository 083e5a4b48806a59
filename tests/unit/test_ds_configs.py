from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.backbone.engine import apply_engine_config, read_engine_config
from softprompt_dist.config import BackboneConfig

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


def dotted_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_each_file_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CELLS)
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.json`" in readme for name in CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_each_file_is_plumbing_that_gives_its_cell(name: str) -> None:
    values = read_engine_config(FOLDER / f"{name}.json")
    backbone = apply_engine_config(BackboneConfig(), values)
    cell = (backbone.sharding, backbone.dtype, backbone.quantization, backbone.offload)
    assert cell == CELLS[name]


@pytest.mark.parametrize("name", CELLS)
def test_deepspeed_knows_each_key_and_the_readme_explains_it(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = json.loads((FOLDER / f"{name}.json").read_text())
    zero = DeepSpeedZeroConfig(**values["zero_optimization"])
    assert zero.stage == values["zero_optimization"]["stage"]
    assert not zero.model_extra
    readme = (FOLDER / "README.md").read_text()
    assert [key for key in dotted_keys(values) if f"`{key}`" not in readme] == []
