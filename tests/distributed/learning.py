"""What one rank does in the test of learning curves: tune a prompt in several cells."""

from __future__ import annotations

import torch
from cells import Settings, batches_of_this_rank, load_cell, make_prompt

from softprompt_dist.parallel.equality import assert_equal_on_all_ranks
from softprompt_dist.run.optimizer import T5XAdafactor
from softprompt_dist.run.step import accumulate_gradient

NUM_STEPS = 100


def learning_curves(folder: str, cells: dict[str, Settings]) -> dict[str, list[float]]:
    """Cell -> loss of each of a hundred steps, always on the same rows."""
    return {name: _curve(folder, settings) for name, settings in cells.items()}


def _curve(folder: str, settings: Settings) -> list[float]:
    backbone = load_cell(folder, settings)
    prompt = make_prompt(backbone)
    optimizer: torch.optim.Optimizer = T5XAdafactor(prompt.parameters(), lr=0.1)
    batches = batches_of_this_rank(backbone)[:1]
    losses = []
    for _ in range(NUM_STEPS):
        losses.append(accumulate_gradient(backbone, prompt, batches, z_loss=0.0)["loss"])
        optimizer.step()
    assert_equal_on_all_ranks(prompt.weight, "The prompt")
    return losses
