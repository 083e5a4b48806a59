"""Which weights these are, and whether they have moved."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from softprompt_dist.errors import InvariantError
from softprompt_dist.parallel import ranks

_SAMPLES_PER_TENSOR = 4096


def identity(model: nn.Module) -> str:
    """Fingerprint of an unsharded model: names, shapes and a sample of every tensor.

    Values are rounded to bf16 first, so a model read in fp32 and in bf16 has the same identity.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)].to(torch.bfloat16)
        digest.update(sample.contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def local_checksum(model: nn.Module) -> str:
    """Checksum over every bit of the weights that this rank holds (its shards under ZeRO-3)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        held: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
        digest.update(f"{name}{_sums_of_bits(held)}".encode())
    return digest.hexdigest()


def assert_unchanged(model: nn.Module, checksum_before: str) -> None:
    """All ranks: the weights that each rank holds are those it held at `checksum_before`.

    Raises:
        InvariantError: on all ranks, if a weight moved on any.
    """
    moved = local_checksum(model) != checksum_before
    where = [rank for rank, changed in enumerate(ranks.gather_objects(moved)) if changed]
    if where:
        raise InvariantError(
            f"Backbone weights changed on ranks {where}, but only the prompt may train. "
            "The prompts of this run belong to no backbone; find what wrote to the weights."
        )


def _sums_of_bits(tensor: Tensor) -> tuple[int, int]:
    """A plain and a position-weighted sum of the bits, exact in wrapping int64."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    plain = weighted = 0
    for start, chunk in enumerate(tensor.contiguous().view(-1).view(width).split(1 << 24)):
        values = chunk.to(torch.int64)
        positions = torch.arange(1, values.numel() + 1, device=values.device)
        plain += int(values.sum())
        weighted += int((values * positions).sum()) * (start + 1)
    return plain, weighted
