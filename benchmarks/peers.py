"""The peer: Hugging Face's T5 under DeepSpeed ZeRO-3, repaired where it would be another model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import T5ForConditionalGeneration

from benchmarks.models import DTYPES, HEAD


class T5WithOwnHead(T5ForConditionalGeneration):
    """T5 v1.1 as its checkpoints are: the stacks share the embedding, the head is separate.

    transformers 5 declares every T5's head tied. On a plain load it notices that the checkpoint's
    differs; under ZeRO-3 both are empty on the rank, look equal, and the head is silently lost.
    """

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def zero3_config(dtype: str) -> dict[str, Any]:
    """The ZeRO-3 configuration of Hugging Face's documentation, its `auto` values included."""
    return {
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def scale_live_window(config: dict[str, Any], num_parameters: int) -> None:
    """Make the live window as large a share of this model as the default is of T5-XXL.

    The default, 1e9 parameters, is 9 % of XXL but more than all of a small model, which ZeRO-3 then
    gathers once and keeps whole.
    """
    share = 1e9 / 11_135_332_352
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        config["zero_optimization"][key] = int(share * num_parameters)


def load_under_zero3(folder: Path, ds_config: dict[str, Any], dtype: str) -> tuple[Any, Any]:
    """All ranks: `from_pretrained` under a live ZeRO-3 configuration without `auto`.

    Returns:
        The partitioned model, and the configuration, which must live as long as the model loads.
    """
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(ds_config)
    model = T5WithOwnHead.from_pretrained(str(folder), dtype=DTYPES[dtype])
    return model.requires_grad_(False).eval(), alive


def shard_bytes(parameters: Iterable[nn.Parameter | torch.Tensor]) -> int:
    """Bytes of the parameters' parts that this rank keeps."""
    parts = {id(p): getattr(p, "ds_tensor", p) for p in parameters}
    return sum(part.numel() * part.element_size() for part in parts.values())


def has_checkpoint_head(model: T5ForConditionalGeneration, folder: Path) -> bool:
    """All ranks: whether the head's values are those of the checkpoint."""
    import deepspeed

    weight = model.lm_head.weight
    with deepspeed.zero.GatheredParameters([weight]):
        return torch.equal(weight, _read(folder, HEAD).to(weight.dtype))


def _read(folder: Path, name: str) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                return file.get_tensor(name)
    raise KeyError(name)
