"""The weights of a T5 v1.1 that is made from nothing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import T5ForConditionalGeneration

from softprompt_dist.adapt_config import ArchitectureConfig
from softprompt_dist.backbone.t5_v11 import draw_weights, t5_config
from tests.models import new_weights

SMALL = ArchitectureConfig(d_model=96, d_ff=160, num_heads=4, d_kv=16, num_layers=2)


def test_weights_are_distributed_as_those_of_transformers() -> None:
    """But for the head, which transformers draws as wide as an embedding."""
    config = t5_config(SMALL, 2000)
    weights = new_weights(config, seed=0)
    torch.manual_seed(0)
    reference = dict(T5ForConditionalGeneration(config).named_parameters())
    assert weights.keys() - reference.keys() <= {"lm_head.weight"}
    for name, weight in weights.items():
        expected = 96**-0.5 if name == "lm_head.weight" else float(reference[name].detach().std())
        margin = 8 * expected / weight.numel() ** 0.5
        assert float(weight.std()) == pytest.approx(expected, abs=margin), name
        mean = 1.0 if "layer_norm" in name else 0.0
        assert float(weight.mean()) == pytest.approx(mean, abs=margin), name
    drawn = torch.cat([w.flatten()[:1000] for w in weights.values() if w.dim() > 1])
    assert len(drawn.unique()) > 0.99 * len(drawn), "two weights are drawn alike"
    assert not torch.equal(new_weights(config, seed=1)["shared.weight"], weights["shared.weight"])


def test_a_weight_is_the_same_however_it_is_cut_and_no_more_is_drawn() -> None:
    config, num_elements = t5_config(SMALL, 3 * 2**14), 3 * 2**14 * 96

    def drawn(part: range) -> torch.Tensor:
        return torch.cat([*draw_weights(config, 3, "shared.weight", num_elements, part)])

    whole = drawn(range(num_elements))
    assert len(whole) == num_elements
    for first, last in ((0, 7), (2**20 - 1, 2**20 + 1), (2**21, num_elements), (5, 3 * 2**20)):
        with mock.patch.object(torch, "empty", wraps=torch.empty) as empty:
            assert torch.equal(drawn(range(first, last)), whole[first:last])
        assert sum(call.args[0] for call in empty.call_args_list) < last - first + 2**21
