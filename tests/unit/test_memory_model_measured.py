"""What autograd really keeps for the backward pass, against what the memory model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.saved_activations import LiveBytes
from softprompt_dist.backbone.activations import activation_bytes, kept_bytes
from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Workload
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.backbone.scoring_memory import position_bytes
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.planning.models import find_architecture
from tests.autograd import bytes_kept, drop_as_cuda_does
from tests.models import save_model

WORK = Workload(micro_batch=2, prompt_length=8, input_length=56, target_length=4)
DROPPING = replace(WORK, dropout=0.1)


@pytest.fixture(params=["t5", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "t5":
        config = T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=160,
            num_layers=6,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
        model = T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 64) / 8)
        return save_model(model, tmp_path)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return save_model(LlamaForCausalLM(llama), tmp_path)


def make_batch(work: Workload) -> TokenBatch:
    """Rows as long as can be, but for one."""
    ids_BS = torch.ones(work.micro_batch, work.input_length, dtype=torch.long)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, -9:] = 0
    ids_BT = torch.ones(work.micro_batch, work.target_length, dtype=torch.long)
    return TokenBatch(ids_BS, mask_BS, ids_BT, torch.ones_like(ids_BT))


def kept_for_backward(folder: Path, **settings: object) -> int:
    """Bytes of all storages that a forward pass leaves with autograd, weights apart."""
    section = {"path": str(folder), "sharding": "replicated", "dtype": "fp32", **settings}
    backbone = load_backbone(BackboneConfig.model_validate(section))
    prompt_PD = torch.randn(WORK.prompt_length, backbone.d_model, requires_grad=True)
    rows_BPD = prompt_PD.expand(WORK.micro_batch, -1, -1)
    weights = (tensor for _, tensor in backbone.held_tensors())
    return bytes_kept(lambda: backbone(rows_BPD, make_batch(WORK)), weights)


@pytest.mark.parametrize("checkpointing", ["none", "every_2", "full"])
def test_a_forward_pass_keeps_what_is_predicted(folder: Path, checkpointing: str) -> None:
    architecture: Architecture = find_architecture(str(folder))
    cell = Cell(activation_checkpointing=checkpointing)
    predicted = kept_bytes(architecture, cell, WORK)
    measured = kept_for_backward(folder, activation_checkpointing=checkpointing)
    assert predicted == pytest.approx(measured, rel=0.10)
    assert predicted < activation_bytes(architecture, cell, WORK)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "every_2"])
def test_dropout_on_a_cpu_keeps_what_is_predicted(
    folder: Path, dtype: Literal["fp32", "bf16"], checkpointing: str
) -> None:
    architecture: Architecture = find_architecture(str(folder))
    cell = Cell(dtype=dtype, activation_checkpointing=checkpointing)
    predicted = kept_bytes(architecture, cell, DROPPING, on_cpu=True)
    measured = kept_for_backward(
        folder, dtype=dtype, dropout=DROPPING.dropout, activation_checkpointing=checkpointing
    )
    assert predicted == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dropout_on_a_gpu_keeps_what_is_predicted(
    folder: Path, dtype: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_as_cuda_does(monkeypatch)
    architecture: Architecture = find_architecture(str(folder))
    predicted = kept_bytes(architecture, Cell(dtype=dtype), DROPPING)
    measured = kept_for_backward(folder, dtype=dtype, dropout=DROPPING.dropout)
    assert predicted == pytest.approx(measured, rel=0.05)
    masks = predicted - kept_bytes(architecture, Cell(dtype=dtype), WORK)
    assert (masks > 0) == (architecture.family == "seq2seq")


class PeakBytes(LiveBytes):
    """The most bytes that operations had made and that were alive at once."""

    peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.peak = max(self.peak, self.total)
        return result


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_scoring_takes_no_more_than_is_predicted(
    folder: Path, dtype: Literal["fp32", "bf16"]
) -> None:
    section = {"path": str(folder), "sharding": "replicated", "dtype": dtype}
    backbone = load_backbone(BackboneConfig.model_validate(section))
    work = Workload(micro_batch=8, prompt_length=8, input_length=120, target_length=0)
    prompt_BPD = torch.randn(work.prompt_length, backbone.d_model).expand(work.micro_batch, -1, -1)
    with PeakBytes(backbone) as greedy:
        reading = backbone.read(prompt_BPD, make_batch(work))
        for _ in range(4):
            reading = backbone.extend(reading, torch.ones(work.micro_batch, dtype=torch.long))
    del reading
    with PeakBytes(backbone) as rank:
        answers_AT = torch.ones(3, 4, dtype=torch.long)
        backbone.score_answers(
            prompt_BPD, make_batch(work), [answers_AT], lambda logits, _: logits.log_softmax(-1)
        )
    architecture = find_architecture(str(folder))
    predicted = position_bytes(architecture, Cell(dtype=dtype), work)
    length = work.prompt_length + work.input_length
    assert 0.5 * predicted < greedy.peak / (work.micro_batch * length) < predicted
    # As `Scorer` counts them: a decoder-only model holds the input once for each answer.
    counted = 3 * (length + 4) if architecture.family == "causal" else length + 3 * 4
    assert rank.peak / (work.micro_batch * counted) < predicted
