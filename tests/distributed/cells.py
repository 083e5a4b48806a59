"""What one rank does in the tests of the cells: load a backbone in a cell and tune a step in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch, TokenExample, collate
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.step import accumulate_gradient

ROWS_PER_MICRO_BATCH = 6
NUM_MICRO_BATCHES = 2
PROMPT_LENGTH = 6
Settings = dict[str, Any]


def make_examples(vocab_size: int) -> list[TokenExample]:
    """Rows of many lengths."""
    generator = torch.Generator().manual_seed(4)

    def ids(length: int) -> tuple[int, ...]:
        drawn = torch.randint(3, vocab_size, (length,), generator=generator)
        return (*drawn.tolist(), 1)

    count = ROWS_PER_MICRO_BATCH * NUM_MICRO_BATCHES
    return [TokenExample(ids(2 + 3 * i % 7), ids(1 + i % 3)) for i in range(count)]


def make_prompt(backbone: Backbone) -> SoftPrompt:
    """The same prompt on every rank, in every cell."""
    generator = torch.Generator().manual_seed(3)
    initial_PD = torch.randn(PROMPT_LENGTH, backbone.d_model, generator=generator)
    return SoftPrompt(initial_PD).to(ranks.device())


def batches_of_this_rank(backbone: Backbone) -> list[TokenBatch]:
    """The same rows in all, and as many micro-batches on each rank, for up to six ranks."""
    examples = make_examples(backbone.vocabulary_size)
    size, mine = ROWS_PER_MICRO_BATCH, slice(ranks.rank(), None, ranks.world_size())
    micro_batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [collate(rows[mine], pad_id=0, family=backbone.family) for rows in micro_batches]


def load_cell(folder: str, settings: Settings) -> Backbone:
    """The backbone in the cell that the settings describe; replicated where they say nothing."""
    return load_backbone(BackboneConfig(path=folder, **{"sharding": "replicated", **settings}))


def step(backbone: Backbone, prompt: SoftPrompt) -> dict[str, float]:
    """Gradient of all rows into the prompt."""
    return accumulate_gradient(backbone, prompt, batches_of_this_rank(backbone), z_loss=0.0)


@torch.no_grad()
def pass_without_gradient(backbone: Backbone, prompt: SoftPrompt) -> Tensor:
    """As scoring does it: logits_NV of the target tokens of this rank's first micro-batch."""
    batch, *_ = batches_of_this_rank(backbone)
    logits_BTV = backbone(prompt(len(batch.input_ids_BS), backbone.dtype), batch)
    return logits_BTV[batch.target_mask_BT.bool().to(logits_BTV.device)].float().cpu()


class Poison:
    """Fills memory that the blocks of a backbone have just given back with NaN.

    What a block gathers is freed after its use. Whoever still reads it, because a view was kept or
    a stream did not wait, reads NaN from then on, in every format: its bytes are all ones.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.num_fillings = 0
        self._sizes = sorted({block.num_bytes for block in backbone.blocks()})
        for block in backbone.blocks():
            block.register_forward_hook(self._after_forward)

    def fill(self) -> None:
        """Take memory of every block's size, twice (a backward pass holds two), and free it."""
        device = ranks.device()
        freed = [torch.empty(n, dtype=torch.uint8, device=device) for n in 2 * self._sizes]
        for run in freed:
            run.fill_(255)
        self.num_fillings += 1

    def _after_forward(self, _: Any, __: Any, output: Any) -> None:
        self.fill()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:  # and once the blocks behind it have had their gradients
            hidden.register_hook(lambda _: self.fill())


def tuned_in_cell(
    folder: str, settings: Settings, *, num_steps: int, poisoned: bool
) -> dict[str, Any]:
    """The losses of some steps of gradient descent, with a pass without gradient between them."""
    backbone = load_cell(folder, settings)
    prompt = make_prompt(backbone)
    poison = Poison(backbone) if poisoned else None
    losses = []
    for _ in range(num_steps):
        losses.append(step(backbone, prompt)["loss"])
        pass_without_gradient(backbone, prompt)
        with torch.no_grad():
            prompt.weight -= 0.1 * prompt.weight.grad
    return {"losses": losses, "fillings": poison.num_fillings if poison else 0}


def tuned_in_cells(
    folder: str, cells: dict[str, Settings], num_steps: int
) -> dict[str, dict[str, Any]]:
    """Cell's name -> `tuned_in_cell` with memory left alone and, as "poisoned NAME", not."""
    return {
        f"{prefix}{name}": tuned_in_cell(
            folder, settings, num_steps=num_steps, poisoned=bool(prefix)
        )
        for name, settings in cells.items()
        for prefix in ("", "poisoned ")
    }


def gradient_in_cell(folder: str, name: str, settings: Settings) -> dict[str, Any]:
    """Loss and gradient of four steps, scoring between them; the rest goes to `gradient_file`.

    ZeRO-3 takes another way in each: it records the order of the blocks, follows it, loses it.
    """
    backbone = load_cell(folder, settings)
    prompt = make_prompt(backbone)
    losses = []
    for index in range(4):
        losses.append(step(backbone, prompt)["loss"])
        assert prompt.weight.grad is not None
        found = {"gradient": prompt.weight.grad.cpu()}
        if index == 1:
            found["logits"] = pass_without_gradient(backbone, prompt)
        save_file(found, gradient_file(folder, name, ranks.rank(), index))
    return {
        "losses": losses,
        "gathered_bytes_left": sum(p.numel() for p in backbone.parameters()),
        "identity": backbone.identity.digest,
    }


def gradients_in_cells(work: dict[str, dict[str, Settings]]) -> dict[str, Any]:
    """Folder -> cell's name -> `gradient_in_cell`."""
    return {
        folder: {name: gradient_in_cell(folder, name, settings) for name, settings in cells.items()}
        for folder, cells in work.items()
    }


def gradients(
    folder: str | Path, cell: str, world_size: int, steps: Sequence[int] = range(4)
) -> torch.Tensor:
    """What the ranks found in steps: [ranks, steps, P, D]."""
    files = [[gradient_file(folder, cell, rank, i) for i in steps] for rank in range(world_size)]
    return torch.stack(
        [torch.stack([load_file(file)["gradient"] for file in of_rank]) for of_rank in files]
    )


def logits(folder: str | Path, cell: str, rank: int = 0) -> Tensor:
    """What a rank found between steps, see `pass_without_gradient`."""
    return load_file(gradient_file(folder, cell, rank, 1))["logits"]


def gradient_file(folder: str | Path, cell: str, rank: int, index: int) -> str:
    """Where a rank puts the gradient of a step."""
    return str(Path(folder) / f"gradient-{cell}-{rank}-{index}.safetensors")
