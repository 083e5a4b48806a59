"""The parts that ranks read for themselves make up the weights, wherever they are cut."""

import pytest
import split_parts
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from tests.models import make_llama, make_t5, save_model

QUANTIZATIONS = ["none", "int8"]


def smallest_t5():
    """Odd sizes, and a head of which some ranks hold not one element."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=5,
            d_model=3,
            d_kv=5,
            d_ff=7,
            num_layers=1,
            num_heads=1,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            decoder_start_token_id=0,
        )
    )


MODELS = {"odd t5": lambda: make_t5(131), "llama": make_llama, "smallest t5": smallest_t5}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda size: f"{size} ranks")
def parts(request, run_functions, tmp_path_factory):
    """Model -> quantization -> the parts of all ranks in their order; and the model's folder."""
    root = tmp_path_factory.mktemp("parts")
    folders = [save_model(make(), root / name) for name, make in MODELS.items()]
    said = run_functions(
        split_parts.save_parts,
        request.param,
        folders=[str(folder) for folder in folders],
        quantizations=QUANTIZATIONS,
        timeout=120,
    )
    return {
        (name, quantization): (folder, [load_file(files[i][j]) for files in said])
        for i, (name, folder) in enumerate(zip(MODELS, folders, strict=True))
        for j, quantization in enumerate(QUANTIZATIONS)
    }


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_parts_in_a_row_are_the_whole(parts, name, quantization):
    folder, held = parts[name, quantization]
    config = BackboneConfig(path=str(folder), sharding="replicated", quantization=quantization)
    whole = load_backbone(config)
    assert sum(1 for _ in whole.blocks()) == len(held[0])
    for block_name, block in whole.model.named_modules():
        if not hasattr(block, "slots"):
            continue
        run = torch.cat([part[f"model.{block_name}.flat"] for part in held])
        assert len({len(part[f"model.{block_name}.flat"]) for part in held}) == 1
        for slot in block.slots:
            found = run[slot.start : slot.end].view(slot.num_rows, -1)
            assert torch.equal(found, slot.bytes_RN), slot.name
