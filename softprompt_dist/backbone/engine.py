"""DeepSpeed's plumbing: what a ds_config may say, and what the recipe says instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from softprompt_dist.backbone.ds_config import (
    BATCH_KEYS,
    check_zero,
    misplaced,
    quoted_stage,
    read_ds_object,
    reason_of,
    similar_key,
)
from softprompt_dist.backbone.host_memory import NVME_BUFFERS
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import ConfigError

OWN_SECTION = "softprompt"
"""Settings in a ds_config that are ours, not DeepSpeed's."""
_OWN_KEYS = (
    "quantization",
    "quantized_layers",
    "outlier_threshold",
    "shard_group",
    "activation_checkpointing",
)
_BELONGS_TO_RECIPE = {
    **BATCH_KEYS,
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.warmup_steps",
    "gradient_clipping": "optimizer.clipping_threshold",
}
_SECTIONS = ("zero_optimization", "bf16", "fp16", OWN_SECTION)
_NUMBERS_NOT_BYTES = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_hpz_partition_size",
)
"""DeepSpeed's own ways, which take a parameter's elements for weights; ours are bytes."""


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of what is gathered at a time."""

    largest_repeated: int
    head: int
    num_parts: int
    """Into how many parts each is cut."""

    @property
    def largest_part(self) -> int:
        """Bytes of the largest part that a rank holds."""
        return -(-max(self.largest_repeated, self.head) // self.num_parts)


def read_engine_config(path: str | Path) -> dict[str, Any]:
    """The JSON of a ds_config, checked.

    Raises:
        ConfigError: missing, not JSON, sets what belongs to the recipe, asks for fp16 or for a ZeRO
            stage that shards nothing of a frozen model.
    """
    return read_ds_object(path, lambda values: _wrong_kinds(values) or _misplaced(values))


def apply_engine_config(backbone: BackboneConfig, values: dict[str, Any]) -> BackboneConfig:
    """The backbone section with the cell as the ds_config has it.

    Raises:
        ConfigError: a combination that does not exist.
    """
    changes: dict[str, Any] = {"sharding": "zero3" if _stage(values) == 3 else "replicated"}
    if "bf16" in values:
        changes["dtype"] = "bf16" if values["bf16"].get("enabled") else "fp32"
    offload = values.get("zero_optimization", {}).get("offload_param")
    if offload is not None:
        changes["offload"] = offload.get("device", "cpu")
        changes["offload_path"] = offload.get("nvme_path")
    changes |= values.get(OWN_SECTION, {})
    try:
        return BackboneConfig.model_validate(backbone.model_dump() | changes)
    except ValidationError as error:
        reasons = " ".join(reason_of(problem) for problem in error.errors())
        raise ConfigError(f"ds_config and recipe together: {reasons}") from error


def engine_config(
    backbone: BackboneConfig, values: dict[str, Any] | None, sizes: BlockSizes
) -> dict[str, Any]:
    """What DeepSpeed is given for a sharded backbone: the ds_config, completed.

    Args:
        backbone: the recipe's section.
        values: the ds_config, or None.
        sizes: of the blocks.

    Raises:
        ConfigError: DeepSpeed does not know a key or a value of `zero_optimization`.
    """
    base = {} if values is None else {k: v for k, v in values.items() if k != OWN_SECTION}
    ours: dict[str, Any] = {
        "stage": 3,
        # A parameter is a whole block. Any room at all brings the next one in, and there is room
        # beside one block only: exactly one is on its way.
        "stage3_prefetch_bucket_size": 1,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": sizes.largest_repeated + 1,
        # The last block stays while the head is used, since the backward pass begins with both.
        "stage3_max_reuse_distance": 2 * sizes.head + 1,
        # Our layers keep no input and no gathered copy, which this switch is for.
        "memory_efficient_linear": False,
    }
    if backbone.offload != "none":
        ours["offload_param"] = _offload(backbone, sizes.largest_part)
    given = base.get("zero_optimization", {})
    offload = ours.get("offload_param", {}) | (given.get("offload_param") or {})
    if backbone.offload == "nvme":
        offload["nvme_path"] = backbone.offload_path  # the ds_config's, without its `~`
    zero = ours | given | ({"offload_param": offload} if offload else {})
    check_zero(zero)
    # Parameters are bytes, so DeepSpeed has nothing to cast; batches never pass through it.
    return {
        **base,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": False},
    }


def _offload(backbone: BackboneConfig, largest_part: int) -> dict[str, Any]:
    if backbone.offload == "cpu":
        return {"device": "cpu", "pin_memory": True}
    return {
        "device": "nvme",
        "nvme_path": backbone.offload_path,
        "pin_memory": True,
        "buffer_count": NVME_BUFFERS,
        "buffer_size": largest_part,
    }


def _wrong_kinds(values: dict[str, Any]) -> list[str]:
    found = {name: values.get(name, {}) for name in _SECTIONS}
    zero = found["zero_optimization"]
    if isinstance(zero, dict) and zero.get("offload_param") is not None:
        found["zero_optimization.offload_param"] = zero["offload_param"]
    problems = [
        f"sets {name!r} to {value!r}; it must be an object of settings."
        for name, value in found.items()
        if not isinstance(value, dict)
    ]
    if not problems and (stage := quoted_stage(zero)):
        problems = [
            f"sets zero_optimization.stage to {stage}; it must be a number. "
            "Use 3 (sharded) or 0 (replicated)."
        ]
    return problems or [
        f"sets {name!r} to {values[name]}; its 'enabled' must be true or false, without quotes."
        for name in ("bf16", "fp16")
        if name in values and values[name].get("enabled") not in (True, False, "auto")
    ]


def _misplaced(values: dict[str, Any]) -> list[str]:
    problems = misplaced(values, _BELONGS_TO_RECIPE, _SECTIONS)
    problems += [
        f"sets {OWN_SECTION}.{key}, which is unknown.{_nearest(key)}"
        for key in values.get(OWN_SECTION, {})
        if key not in _OWN_KEYS
    ]
    problems += [
        f"sets zero_optimization.{key}, which would take a layer's bytes for numbers. Use "
        f"{OWN_SECTION}.quantization or {OWN_SECTION}.shard_group."
        for key in _NUMBERS_NOT_BYTES
        if values.get("zero_optimization", {}).get(key)
    ]
    if values.get("fp16", {}).get("enabled"):
        problems.append("enables fp16, in which T5 overflows. Use bf16.")
    if _stage(values) not in (0, 3):
        problems.append(
            f"sets ZeRO stage {_stage(values)}, which shards gradients and optimizer states "
            "that a frozen backbone does not have. Use 3 (sharded) or 0 (replicated)."
        )
    return problems


def _nearest(key: str) -> str:
    return f"{similar_key(key, _OWN_KEYS)} Known: {', '.join(_OWN_KEYS)}."


def _stage(values: dict[str, Any]) -> Any:
    return values.get("zero_optimization", {}).get("stage", 0)
