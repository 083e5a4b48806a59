"""Our T5 gives the numbers of transformers' T5 and keeps less for the backward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenExample, collate
from tests import reference

D_MODEL, HEADS, D_KV, D_FF = 24, 3, 10, 40
SAME_LENGTHS = (
    TokenExample((5, 6, 7, 8, 1), (20, 30, 1)),
    TokenExample((9, 10, 11, 12, 1), (21, 22, 1)),
)
KINDS: dict[str, dict[str, Any]] = {
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "gated silu": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
}


def save(folder: Path, kind: str, num_layers: int = 2) -> T5ForConditionalGeneration:
    """Write a random T5 with lively weights; the head is its own where the kind has one."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61,
        d_model=D_MODEL,
        d_kv=D_KV,
        d_ff=D_FF,
        num_heads=HEADS,
        num_layers=num_layers,
        num_decoder_layers=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        dropout_rate=0.1,
        **KINDS[kind],
    )
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(61, D_MODEL) / 5, requires_grad=False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return model


def load(folder: Path, **settings: Any) -> Backbone:
    return load_backbone(BackboneConfig(path=str(folder), sharding="replicated", **settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [reference.EXAMPLES, SAME_LENGTHS], ids=["padded", "full"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_logits_and_gradient_are_those_of_transformers(
    kind: str, examples: tuple[TokenExample, ...], checkpointing: str, tmp_path: Path
) -> None:
    model = save(tmp_path, kind)
    backbone = load(tmp_path, activation_checkpointing=checkpointing)
    ours, plain = reference.ours(backbone, examples), reference.plain(model, examples)
    reference.assert_equal(ours, plain, logits=1e-5, gradient=1e-6)


def test_the_scale_of_v1_0_is_not_that_of_v1_1(tmp_path: Path) -> None:
    """Else a test that always scales, or never, could pass."""
    model = save(tmp_path, "v1.0")
    scaled = reference.plain(model).logits[0]
    model.config.scale_decoder_outputs = False
    torch.testing.assert_close(reference.plain(model).logits[0], scaled * D_MODEL**0.5)


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    expected = reference.plain(save(tmp_path, "v1.1"))
    found = reference.ours(load(tmp_path, dtype="bf16"))
    for found_TV, expected_TV in zip(found.logits, expected.logits, strict=True):
        assert (found_TV - expected_TV).norm() < 0.02 * expected_TV.norm()
    difference = (found.gradient_PD - expected.gradient_PD).norm()
    assert difference < 0.1 * expected.gradient_PD.norm()


@pytest.mark.parametrize("checkpointing", ["none", "full", "every_2"])
def test_dropout_is_drawn_from_the_seed(tmp_path: Path, checkpointing: str) -> None:
    save(tmp_path, "v1.1")
    backbone = load(tmp_path, dropout=0.2, activation_checkpointing=checkpointing)

    def seeded(seed: int) -> reference.Result:
        torch.manual_seed(seed)
        return reference.ours(backbone)

    first, again, other = seeded(1), seeded(1), seeded(2)
    reference.assert_equal(again, first, logits=0, gradient=0)
    assert not torch.allclose(other.logits[0], first.logits[0])
    assert not torch.allclose(other.gradient_PD, first.gradient_PD)
    backbone.eval()
    reference.assert_equal(seeded(2), seeded(1), logits=0, gradient=0)


def test_checkpointing_changes_no_draw_of_dropout(tmp_path: Path) -> None:
    save(tmp_path, "v1.1")
    results = []
    for checkpointing in ("none", "full"):
        backbone = load(tmp_path, dropout=0.2, activation_checkpointing=checkpointing)
        torch.manual_seed(1)
        results.append(reference.ours(backbone))
    reference.assert_equal(*results, logits=0, gradient=1e-6)


def kept_bytes(folder: Path, num_layers: int, checkpointing: str) -> int:
    """Bytes kept for the backward pass, of storages that are no weights."""
    save(folder, "v1.1", num_layers)
    backbone = load(folder, activation_checkpointing=checkpointing)
    weights = {t.untyped_storage().data_ptr() for _, t in backbone.held_tensors()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    prompt_PD = reference.make_prompt(D_MODEL).requires_grad_(True)
    batch = collate(reference.EXAMPLES, pad_id=0, family="seq2seq")
    keep_nothing: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, keep_nothing):
        logits = backbone(prompt_PD.expand(len(reference.EXAMPLES), -1, -1), batch)
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("checkpointing", "units"),
    [("none", 2 + 4 * HEADS * D_KV / D_MODEL + 2 * D_FF / D_MODEL), ("full", 1)],
)
def test_an_encoder_layer_keeps_what_its_gradient_needs(
    checkpointing: str, units: float, tmp_path: Path
) -> None:
    """Two norm inputs, q, k, v, attended, and the two factors of the gated layer; or the input.

    A unit is one [B, S, D] tensor. Attention also keeps a number per query and head.
    """
    few, more = (kept_bytes(tmp_path / str(n), n, checkpointing) for n in (2, 5))
    positions = reference.PROMPT_LENGTH + max(len(e.input_ids) for e in reference.EXAMPLES)
    rows = len(reference.EXAMPLES) * positions
    per_query = HEADS * 4 * rows if checkpointing == "none" else 0
    assert (more - few) / 3 - per_query == pytest.approx(units * rows * D_MODEL * 4)


def test_an_mt5_has_its_own_head_and_no_scale(tmp_path: Path) -> None:
    model = save(tmp_path, "v1.1")
    expected = reference.plain(model)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["scale_decoder_outputs"]
    file.write_text(json.dumps({**values, "model_type": "mt5", "tie_word_embeddings": False}))
    reference.assert_equal(reference.ours(load(tmp_path)), expected, logits=1e-5, gradient=1e-6)
