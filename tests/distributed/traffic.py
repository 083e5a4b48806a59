"""What one rank does in the tests of traffic: tune steps and tell what moved in each."""

from __future__ import annotations

from typing import Any

from cells import NUM_MICRO_BATCHES, Settings, gradient_file, load_cell, make_prompt, step
from collectives import Record, recorded
from safetensors.torch import save_file

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt

NUM_STEPS = 3


def traffic_of_cells(folder: str, cells: dict[str, Settings]) -> dict[str, Any]:
    """Cell -> what loading and each step moved."""
    with recorded() as record:
        return {name: _traffic(folder, name, cells[name], record) for name in cells}


def _traffic(folder: str, name: str, settings: Settings, record: Record) -> dict[str, Any]:
    record.calls.clear()
    backbone = load_cell(folder, settings)
    loading_calls = _calls(record)
    flats = [block.flat for block in backbone.blocks()]
    prompt = make_prompt(backbone)
    steps = [_step(backbone, prompt, record) for _ in range(NUM_STEPS)]
    assert prompt.weight.grad is not None
    last = gradient_file(folder, name, ranks.rank(), NUM_STEPS - 1)
    save_file({"gradient": prompt.weight.grad}, last)
    return {
        "model_bytes": sum(getattr(flat, "ds_numel", flat.numel()) for flat in flats),
        "prompt_bytes": prompt.weight.numel() * prompt.weight.element_size(),
        "loading_calls": loading_calls,
        "steps": steps,
    }


def _step(backbone: Backbone, prompt: SoftPrompt, record: Record) -> dict[str, Any]:
    record.calls.clear()
    before = backbone.traffic.gathered_bytes, backbone.traffic.num_gathers
    loss = step(backbone, prompt)["loss"]
    gathers = [call for call in record.calls if call.is_gather]
    return {
        "loss": loss,
        "calls": _calls(record),
        "gathered_bytes": sum(call.received_bytes for call in gathers) / NUM_MICRO_BATCHES,
        "num_gathers": len(gathers) / NUM_MICRO_BATCHES,
        "own_gathered_bytes": (backbone.traffic.gathered_bytes - before[0]) / NUM_MICRO_BATCHES,
        "own_num_gathers": (backbone.traffic.num_gathers - before[1]) / NUM_MICRO_BATCHES,
    }


def _calls(record: Record) -> list[tuple[str, tuple[int, ...], int]]:
    return [(call.name, call.members, call.num_bytes) for call in record.calls]
