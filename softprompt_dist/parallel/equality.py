"""Prompts are equal on every rank: checked, not hoped."""

from __future__ import annotations

import hashlib

from torch import Tensor

from softprompt_dist.errors import InvariantError
from softprompt_dist.parallel import ranks


def digest(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def assert_same_on_all_ranks(value: object, name: str) -> None:
    """All ranks: what was read here was read everywhere; `value` is compared by its repr.

    Raises:
        InvariantError: on all ranks, naming those that differ from rank 0.
    """
    values = ranks.gather_objects(repr(value))
    different = _unlike_rank_0(values)
    if different:
        raise InvariantError(
            f"{name} on ranks {different} is {values[different[0]][:200]}, but on rank 0 "
            f"{values[0][:200]}. All nodes must read the same: use a folder that they share, or "
            "clear the caches of those ranks' nodes."
        )


def assert_equal_on_all_ranks(tensor: Tensor, name: str) -> str:
    """All ranks: the bits of an fp32 `tensor` are the same everywhere.

    Returns:
        The common sha256.

    Raises:
        InvariantError: on all ranks, naming those that differ from rank 0.
    """
    digests = ranks.gather_objects(digest(tensor))
    different = _unlike_rank_0(digests)
    if different:
        raise InvariantError(
            f"{name} differs from rank 0's on ranks {different}. Every rank must apply the same "
            "update to the same values; the last checkpoint holds the last equal state."
        )
    return digests[0]


def _unlike_rank_0(values: list[str]) -> list[int]:
    return [rank for rank, value in enumerate(values) if value != values[0]]
