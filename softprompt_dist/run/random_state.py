"""The random state of this rank: torch's generators on the CPU and on its accelerator."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt_dist.parallel import ranks

log = logging.getLogger(__name__)


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


def joined_random_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The states of all ranks, in rank order, under names of their own."""
    return {f"rank{r}.{kind}": t for r, state in enumerate(states) for kind, t in state.items()}


def resumed_random_state(
    joined: Mapping[str, Tensor], saved_world_size: int, state: Mapping[str, Any], step: int
) -> dict[str, Tensor]:
    """This rank's state in what `joined_random_states` made at the save.

    On another number of ranks it is derived from `state["seed"]`, step and rank, with a warning.
    """
    rank, world_size = ranks.rank(), ranks.world_size()
    derived = derived_random_state(int(state.get("seed", 0)), step, rank, world_size)
    if saved_world_size == world_size:
        prefix = f"rank{rank}."
        own = {n.removeprefix(prefix): t for n, t in joined.items() if n.startswith(prefix)}
        return derived | own
    if ranks.is_main():
        log.warning(
            "Saved on %d rank(s), resumed on %d: random states (dropout) are derived anew from "
            "seed, step and rank; without dropout the run continues equal to rounding.",
            saved_world_size,
            world_size,
        )
    return derived
