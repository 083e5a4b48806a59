"""What autograd keeps when all weights are trained, against what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, T5Config

from softprompt_dist.adaptation.model import CausalModel, TrainableT5, recompute_layers
from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.backbone.cell import Workload
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.planning.adaptation_activations import (
    AUTOCAST,
    BF16,
    FP32,
    Numbers,
    activation_bytes,
    kept_bytes,
)
from tests.autograd import bytes_kept, drop_as_cuda_does

ROWS, INPUTS, TARGETS = 2, 48, 36


class _FusedNorm(torch.autograd.Function):
    """Keeps what one kernel on a GPU keeps; the numbers do not matter here."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden * weight


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nn.RMSNorm, "forward", lambda norm, hidden: _FusedNorm.apply(hidden, norm.weight)
    )


def t5(dropout: float = 0.0) -> tuple[nn.Module, PretrainedConfig]:
    config = T5Config(
        vocab_size=104,
        d_model=64,
        d_kv=16,
        d_ff=168,
        num_heads=5,
        num_layers=4,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=dropout,
        tie_word_embeddings=False,
        scale_decoder_outputs=False,
        decoder_start_token_id=0,
    )
    model = TrainableT5(config)
    # With a gradient of its own, a CPU's attention keeps the scores; a GPU's does not.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    return model, config


def llama() -> tuple[nn.Module, PretrainedConfig]:
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=64,
        intermediate_size=168,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return CausalModel(LlamaForCausalLM(config)), config


def packed_rows() -> RowBatch:
    inputs, targets = (torch.ones(ROWS, n, dtype=torch.long) for n in (INPUTS, TARGETS))
    inputs_segments, targets_segments = inputs.clone(), targets.clone()
    inputs_segments[:, INPUTS // 2 :] = 2
    targets_segments[:, TARGETS // 3 :] = 2
    return RowBatch(targets, targets, targets_segments, True, False, 0, inputs, inputs_segments)


def kept_for_backward(model: nn.Module, numbers: Numbers) -> int:
    """Bytes of all storages that a forward pass leaves with autograd, weights and casts apart."""
    parameters = list(model.parameters())
    shapes = {shape for p in parameters for shape in (p.shape, p.shape[::-1])}
    with torch.autocast("cpu", torch.bfloat16, enabled=numbers.casts):
        return bytes_kept(
            lambda: model.logits(packed_rows()),
            parameters,
            lambda tensor: tensor.shape not in shapes or tensor.dim() < 2,
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "recomputed"])
@pytest.mark.parametrize("numbers", [BF16, AUTOCAST, FP32], ids=["bf16", "autocast", "fp32"])
@pytest.mark.parametrize("make", [t5, llama])
def test_a_forward_pass_keeps_what_is_predicted(
    make: Callable[[], tuple[nn.Module, PretrainedConfig]], numbers: Numbers, checkpointing: bool
) -> None:
    model, config = make()
    model.train().to(torch.bfloat16 if numbers is BF16 else torch.float32)
    if checkpointing:
        recompute_layers(model)
    architecture = architecture_of("tiny", config.to_dict())
    work = Workload(ROWS, 0, INPUTS if architecture.num_decoder_layers else 0, TARGETS)
    predicted = kept_bytes(architecture, work, numbers, checkpointing=checkpointing)
    measured = kept_for_backward(model, numbers)
    assert predicted == pytest.approx(measured, rel=0.10)
    assert predicted < activation_bytes(architecture, work, numbers, checkpointing=checkpointing)


def test_the_masks_of_dropout_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    drop_as_cuda_does(monkeypatch)
    model, config = t5(dropout=0.1)
    architecture = architecture_of("tiny", config.to_dict())
    plain, dropping = (Workload(ROWS, 0, INPUTS, TARGETS, dropout) for dropout in (0.0, 0.1))
    predicted = kept_bytes(architecture, dropping, BF16, checkpointing=False)
    assert predicted > 1.04 * kept_bytes(architecture, plain, BF16, checkpointing=False)
    measured = kept_for_backward(model.train().to(torch.bfloat16), BF16)
    assert predicted == pytest.approx(measured, rel=0.05)
