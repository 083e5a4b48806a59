"""A micro-batch is given to a device without asking the device for anything.

The "device" is torch's meta device: it computes nothing, so that asking it for a number, or for a
tensor back, is an error.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.embedding import FrozenEmbedding
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch, TokenExample, collate
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.loss import token_loss
from tests.models import make_causal, make_t5, save_model

META = torch.device("meta")
PADDED = [TokenExample((5, 6, 7), (8, 1)), TokenExample((9,), (1,))]
EVEN = [TokenExample((5, 6, 7), (8, 1)), TokenExample((9, 4, 3), (7, 1))]
CASES = {"T5": PADDED, "Llama": EVEN, "Gemma2": EVEN}
"""Kind -> rows. transformers itself looks once whether a decoder-only model's rows are padded."""


def on_device(backbone: Backbone, *, with_table: bool) -> Backbone:
    """All weights on the device, but for the table where it stays in the mapped file."""
    backbone.model.to(META)
    for block in backbone.blocks():
        assert block.flat is not None
        block.computation.to(META)
        block.hold(nn.Parameter(block.flat.to(META), requires_grad=False))
    table_VD = backbone.embedding.table_VD.to(META if with_table else "cpu")
    backbone.embedding = FrozenEmbedding(table_VD, META, torch.float32, scale=2.0)
    return backbone


@pytest.mark.parametrize("with_table", [False, True], ids=["mapped table", "table on the device"])
@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_no_device(name: str, with_table: bool, tmp_path: Path) -> None:
    save_model(make_t5() if name == "T5" else make_causal(name), tmp_path)
    backbone = load_backbone(BackboneConfig(path=str(tmp_path), sharding="replicated"))
    on_device(backbone, with_table=with_table)
    prompt = SoftPrompt(torch.zeros(3, backbone.d_model)).to(META)
    rows = prompt(2, torch.float32)
    batch: TokenBatch = collate(CASES[name], pad_id=0, family=backbone.family)
    if name == "T5":  # without kept keys and values transformers looks for packed rows, too
        loss = token_loss(backbone(rows, batch), batch.labels_BT.to(META), z_loss=1e-4)
        loss.total.backward()
        assert prompt.weight.grad is not None
    answers_LT = torch.tensor([[4, 1, 0], [5, 6, 1]])
    (logits,) = backbone.score_answers(rows, batch, [answers_LT], lambda logits, _: logits)
    assert logits.shape[:3] == (2, 2, 3)
    assert logits.device == META
