"""The random state of this rank: torch's generators on the CPU and on its accelerator."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from softprompt_dist.parallel import ranks


def random_state() -> dict[str, Tensor]:
    """Copies of this rank's generator states, uint8 tensors by kind of device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(ranks.device())
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Set this rank's generators to what one of the other functions here returned."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], ranks.device())


def derived_random_state(seed: int, step: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """Generator states for a rank without saved ones: a pure function of the arguments."""
    key = f"{seed}/{step}/{rank}/{world_size}".encode()
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
    state = {"cpu": torch.Generator().manual_seed(number).get_state()}
    if torch.cuda.is_available():
        generator = torch.Generator(device=ranks.device()).manual_seed(number)
        state["cuda"] = generator.get_state()
    return state
