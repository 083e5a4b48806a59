"""DeepSpeed's plumbing: what a ds_config may say, and what the recipe says instead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import ConfigError

_BELONGS_TO_RECIPE = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.warmup_steps",
    "gradient_clipping": "optimizer.clipping_threshold",
}
_SECTIONS = ("zero_optimization", "bf16", "fp16")


def read_engine_config(path: str | Path) -> dict[str, Any]:
    """The JSON of a ds_config, checked.

    Raises:
        ConfigError: missing, not JSON, sets what belongs to the recipe, asks for fp16 or for a ZeRO
            stage that shards nothing of a frozen model.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"Cannot read ds_config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"ds_config {path} must be a JSON object.")
    problems = _wrong_kinds(values) or _misplaced(values)
    if problems:
        raise ConfigError(f"ds_config {path}\n" + "\n".join(f"  - {p}" for p in problems))
    return values


def apply_engine_config(backbone: BackboneConfig, values: dict[str, Any]) -> BackboneConfig:
    """The backbone section with sharding and dtype as the ds_config has them."""
    changes: dict[str, Any] = {"sharding": "zero3" if _stage(values) == 3 else "replicated"}
    if "bf16" in values:
        changes["dtype"] = "bf16" if values["bf16"].get("enabled") else "fp32"
    return backbone.model_copy(update=changes)


def engine_config(backbone: BackboneConfig, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a sharded backbone."""
    base: dict[str, Any] = {"zero_optimization": {"stage": 3}} if values is None else dict(values)
    return {
        **base,
        # The engine runs no batches of its own: rows reach the module directly.
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": backbone.dtype == "bf16"},
    }


def _wrong_kinds(values: dict[str, Any]) -> list[str]:
    return [
        f"sets {name!r} to {values[name]!r}; it must be an object of settings."
        for name in _SECTIONS
        if not isinstance(values.get(name, {}), dict)
    ]


def _misplaced(values: dict[str, Any]) -> list[str]:
    problems = [
        f"sets {key!r}, which belongs to the recipe ({home}). Remove it from the JSON."
        for key, home in _BELONGS_TO_RECIPE.items()
        if key in values
    ]
    problems += [
        f'sets {name} to "auto", which only the Hugging Face Trainer fills in. Remove it: '
        "DeepSpeed has a default."
        for name in _automatic(values)
        if name not in _BELONGS_TO_RECIPE
    ]
    if values.get("fp16", {}).get("enabled"):
        problems.append("enables fp16, in which T5 overflows. Use bf16.")
    if _stage(values) not in (0, 3):
        problems.append(
            f"sets ZeRO stage {_stage(values)}, which shards gradients and optimizer states "
            "that a frozen backbone does not have. Use 3 (sharded) or 0 (replicated)."
        )
    return problems


def _automatic(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _automatic(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key


def _stage(values: dict[str, Any]) -> Any:
    return values.get("zero_optimization", {}).get("stage", 0)
