"""Where the released code puts the prompt, and what the encoder may then see."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from softprompt_dist.backbone.seq2seq import Seq2SeqBackbone
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.identity import Identity
from softprompt_dist.prompt.module import SoftPrompt

DATA = Path(__file__).parent / "data" / "prompt_init"


class RecordingModel(nn.Module):
    """Stands for a T5: keeps what it was called with."""

    def forward(self, embeds, mask, decoder_embeds):
        self.embeds, self.mask = embeds, mask
        return torch.zeros(())


class RecordedEmbedding(nn.Module):
    """Gives the recorded embeddings, whatever the tokens are."""

    def __init__(self, embeds):
        super().__init__()
        self.embeds = embeds

    def forward(self, ids):
        return self.embeds


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "combine_and_masks.npz", allow_pickle=False) as file:
        return {name: torch.tensor(array) for name, array in file.items()}


@pytest.fixture(scope="module")
def inputs(expected):
    model = RecordingModel()
    ids = expected["x"]
    target = torch.ones(len(ids), 1, dtype=torch.int64)
    batch = TokenBatch(
        input_ids_BS=ids,
        input_mask_BS=(ids > 0).long(),
        target_ids_BT=target,
        target_mask_BT=target,
    )
    backbone = Seq2SeqBackbone(
        model,
        RecordedEmbedding(expected["x_embed"]),
        SimpleNamespace(decoder_start_token_id=0),
        Identity("recorded", "0"),
    )
    backbone(SoftPrompt(expected["prompt"])(len(ids), torch.float32), batch)
    return model


def test_prompt_comes_before_the_input(inputs, expected):
    assert torch.equal(inputs.embeds, expected["prefix"])


def test_encoder_sees_the_prompt_and_the_input_without_padding(inputs, expected):
    mask = inputs.mask

    assert torch.equal(
        (mask[:, None, :, None] * mask[:, None, None, :]).float(), expected["encoder_mask"]
    )


def test_decoder_sees_the_prompt_positions_too(inputs, expected):
    assert torch.equal(inputs.mask > 0, expected["add_fake_prompt"] > 0)
