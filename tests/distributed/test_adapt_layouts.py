"""What is written into fp32 weights is what the model computes with, however ZeRO sorts them."""

import pytest
import torch

from softprompt_dist.adapt_config import AdaptConfig, ArchitectureConfig
from softprompt_dist.adaptation.engine import AdaptationEngine
from softprompt_dist.adaptation.engine_config import apply_ds_config
from softprompt_dist.backbone.t5_v11 import t5_config
from tests.models import new_weights

ARCHITECTURE = ArchitectureConfig(
    d_model=8, d_kv=4, d_ff=12, num_heads=2, num_layers=1, num_decoder_layers=1
)
SETTINGS = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 1, "round_robin_gradients": True},
    {"stage": 2, "round_robin_gradients": True},
    {"stage": 2, "round_robin_gradients": True, "offload_optimizer": {"device": "cpu"}},
    {"stage": 2, "contiguous_gradients": False, "overlap_comm": True},
    {"stage": 3, "sub_group_size": 100, "stage3_param_persistence_threshold": 0},
    {"stage": 3, "offload_param": {"device": "cpu"}},
]


def carry_out(cells):
    return [differing(zero, bf16) for zero in cells for bf16 in (False, True)]


def differing(zero, bf16):
    """Names of the parameters that are not what was written, and how much was written."""
    import deepspeed

    values = {"zero_optimization": zero, "bf16": {"enabled": bf16}}
    batch = {"global_batch_size": 6, "micro_batch_size": 1}
    config = AdaptConfig(corpus=["unused"], batch=batch)
    model_config = t5_config(ARCHITECTURE, vocabulary_size=11)
    engine = AdaptationEngine(apply_ds_config(config, values), model_config, values)
    expected = new_weights(model_config, seed=1)
    written = 0
    for name, tensor in engine.layout.weights().items():
        for piece in tensor.pieces:
            whole = expected[name].reshape(-1)
            piece.values.copy_(whole[piece.first : piece.first + len(piece.values)])
            written += len(piece.values)
    engine.publish_weights()
    module = engine._engine.module.model  # noqa: SLF001 - what is computed with
    wrong = []
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero["stage"] == 3):
            if not torch.equal(parameter.detach(), expected[name].to(parameter.dtype)):
                wrong.append(name)
    return wrong, written, engine.num_weights


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_are_where_the_layout_says(run_on_ranks, world_size):
    said = run_on_ranks(carry_out, world_size, timeout=300, cells=SETTINGS)
    for of_ranks in zip(*said, strict=True):
        assert [wrong for wrong, *_ in of_ranks] == [[]] * world_size
        assert sum(written for _, written, _ in of_ranks) == of_ranks[0][2]
