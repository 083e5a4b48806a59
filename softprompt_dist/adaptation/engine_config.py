"""What DeepSpeed is told: the recipe's engine section, or a ds_config in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.ds_config import (
    BATCH_KEYS,
    check_zero,
    misplaced,
    quoted_stage,
    read_ds_object,
)
from softprompt_dist.errors import ConfigError

_REFUSED = {
    "torch_autocast": "Set the recipe's dtype.",
    "tensor_parallel": "Weights are sharded by ZeRO alone: set zero_optimization.stage to 3.",
    "sequence_parallel_size": "Rows are not divided: set activation_checkpointing in the recipe.",
    "data_efficiency": "The recipe decides what rows hold.",
    "curriculum_learning": "The recipe decides what rows hold.",
    "compression_training": "Weights are trained in fp32.",
    "weight_quantization": "Weights are trained in fp32.",
    "gradient_allreduce_op": "The loss is a sum over all rows, whatever the ranks.",
    "disable_allgather": "Every rank computes with all weights.",
}
"""What would change the numbers, or who holds what, behind the recipe's back -> the remedy."""
_REFUSED_OF_ZERO: dict[str, tuple[tuple[Any, ...], str]] = {
    "mics_shard_size": ((-1, 0), "The optimizer sums over all ranks, not over groups of them."),
    "zero_hpz_partition_size": ((1,), "Its second copy would not follow what is read from files."),
    "compute_grad_norm": ((True,), "Whether an update is finite is seen from that norm."),
}
"""Setting -> values that do no harm, and the reason."""
_SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "communication_data_type")
_BELONGS_TO_RECIPE = {
    **BATCH_KEYS,
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_clipping": "max_gradient_norm",
}


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """The JSON of a ds_config, checked.

    Raises:
        ConfigError: missing, not a JSON object, asks for fp16, or sets what belongs to the recipe.
    """
    return read_ds_object(path, _problems)


def apply_ds_config(config: AdaptConfig, values: dict[str, Any]) -> AdaptConfig:
    """The recipe with what the ds_config says of stage, off-loading and dtype."""
    changes: dict[str, Any] = {}
    if "zero_optimization" in values:
        zero = values["zero_optimization"]
        device = (zero.get("offload_optimizer") or {}).get("device", "none")
        own = {"zero_stage": zero.get("stage", 0), "offload_optimizer": device}
        changes["engine"] = config.engine.model_dump() | own
    if "bf16" in values:
        changes["dtype"] = "bf16" if values["bf16"].get("enabled") else "fp32"
    try:
        return AdaptConfig.model_validate(config.model_dump() | changes)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"ds_config and recipe together: {reasons}.") from error


def engine_config(
    config: AdaptConfig, values: dict[str, Any] | None, world_size: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        config: the recipe, with the ds_config applied.
        values: the ds_config as it was read, or None.
        world_size: number of ranks.

    Raises:
        ConfigError: DeepSpeed does not know a key or a value.
    """
    base, batch, stage = dict(values or {}), config.batch, config.engine.zero_stage
    # That switch replaces torch's own linear function for the whole process.
    ours = {"stage": stage, "memory_efficient_linear": False}
    zero: dict[str, Any] = ours | base.get("zero_optimization", {})
    if config.engine.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True} | (
            zero.get("offload_optimizer") or {}
        )
    check_zero(zero)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.global_batch_size
        // (batch.micro_batch_size * world_size),
        "zero_optimization": zero,
        # Ours is whole on every stage; DeepSpeed knows its own few only.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.max_gradient_norm or 0.0,
        # At stage 0 weights stay in fp32 and products are made in bf16 by autocast.
        "bf16": {"enabled": config.dtype == "bf16" and stage > 0},
    }
    if settings["bf16"]["enabled"] and "data_types" not in base:
        # bf16 has 8 bits: the sum of tens of micro-batches would lose what the later ones add.
        # At stage 1 fp32 sums would be whole on every rank.
        settings["data_types"] = {"grad_accum_dtype": gradient_sums(config, base)}
    _check_others(base | settings)
    return base | settings


def gradient_sums(config: AdaptConfig, values: dict[str, Any] | None) -> Literal["fp32", "bf16"]:
    """What DeepSpeed adds the gradients of an update's micro-batches up in."""
    if config.dtype == "fp32" or config.engine.zero_stage == 0:
        return "fp32"
    default = "fp32" if config.engine.zero_stage > 1 else "bf16"
    told = (values or {}).get("data_types", {"grad_accum_dtype": default})
    return "fp32" if told.get("grad_accum_dtype") == "fp32" else "bf16"


def _problems(values: dict[str, Any]) -> list[str]:
    problems = misplaced(values, _BELONGS_TO_RECIPE, _SECTIONS)
    problems += [
        f"sets {key!r}, which an adaptation cannot have. {remedy} Remove it from the JSON."
        for key, remedy in _REFUSED.items()
        if key in values
    ]
    zero = values.get("zero_optimization")
    problems += [
        f"sets zero_optimization.{key} to {zero[key]!r}. {reason} Remove it from the JSON."
        for key, (harmless, reason) in _REFUSED_OF_ZERO.items()
        if isinstance(zero, dict) and key in zero and zero[key] not in harmless
    ]
    problems += [
        f"sets {name!r} to {found!r}; it must be {wanted}."
        for name, found, wanted in _of_wrong_kind(values)
    ]
    problems += [
        f"sets {name} to fp16, in which T5 overflows and updates are lost. Use bf16."
        for name in _in_fp16(values)
    ]
    return problems


def _of_wrong_kind(values: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(name, value, what it must be) of settings that are not of the type that we rely on."""
    an_object, sections = "an object of settings", {n: values.get(n, {}) for n in _SECTIONS[:4]}
    yield from (
        (n, found, an_object) for n, found in sections.items() if not isinstance(found, dict)
    )
    zero, bf16 = sections["zero_optimization"], sections["bf16"]
    for name in ("offload_optimizer", "offload_param") if isinstance(zero, dict) else ():
        if not isinstance(zero.get(name) or {}, dict):
            yield f"zero_optimization.{name}", zero[name], an_object
    if isinstance(zero, dict) and quoted_stage(zero):
        yield "zero_optimization.stage", zero["stage"], "a number, such as 3"
    if isinstance(bf16, dict) and not isinstance(bf16.get("enabled", True), bool):
        yield "bf16.enabled", bf16["enabled"], "true or false"


def _in_fp16(values: dict[str, Any]) -> Iterator[str]:
    for section, key in (("fp16", "enabled"), ("data_types", "grad_accum_dtype")):
        found = values.get(section)
        if isinstance(found, dict) and found.get(key) in (True, "fp16", "float16"):
            yield f"{section}.{key}"
    if values.get("communication_data_type") in ("fp16", "float16"):
        yield "communication_data_type"


def _check_others(settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    refusals = (DeepSpeedConfigError, ValueError, TypeError, AssertionError, AttributeError)
    try:
        DeepSpeedConfig(settings)
    except refusals as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"ds_config: DeepSpeed refuses it: {reason}. Correct or remove that setting."
        ) from error
