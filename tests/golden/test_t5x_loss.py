"""T5X's own loss and its gradient on the same logits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt_dist.run.loss import token_loss

DATA = Path(__file__).parent / "data" / "loss"
CASES = json.loads((DATA / "loss.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    with np.load(DATA / "loss.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("key", CASES)
def test_loss_and_gradient_are_the_original_ones(key, arrays):
    case, name = CASES[key], key[: key.index("_z0")]
    logits = torch.tensor(arrays[f"{name}_logits"], requires_grad=True)
    labels = torch.tensor(arrays[f"{name}_targets"], dtype=torch.int64)
    labels[torch.tensor(arrays[f"{name}_weights"]) == 0] = -100
    divisor = case["loss_normalizing_factor"] or 1.0

    loss = token_loss(
        logits, labels, z_loss=case["z_loss"], label_smoothing=case["label_smoothing"]
    )
    (loss.total / divisor).backward()

    z_term = (loss.total - loss.cross_entropy).item() / divisor
    assert loss.total.item() / divisor == pytest.approx(case["loss"], rel=1e-5)
    assert z_term == pytest.approx(case["z_loss_term"], rel=1e-3)
    assert int(loss.num_tokens) == case["weight_sum"]
    np.testing.assert_allclose(
        logits.grad * divisor, arrays[f"{key}_grad"] * divisor, rtol=1e-4, atol=1e-5
    )
