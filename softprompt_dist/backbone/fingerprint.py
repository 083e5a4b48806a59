"""Which weights these are, and whether they have moved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.errors import InvariantError
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import phase

IDENTITY_KEY = "softprompt_identity"
"""In the header of a converted checkpoint: the identity of what it was made from."""
_SAMPLED_PLACES = 4
_SAMPLE_ELEMENTS = 1024


def fingerprint(reader: CheckpointReader, stored_names: Mapping[str, str]) -> str:
    """Fingerprint of a checkpoint: names, shapes and four samples of every tensor.

    Values are rounded to bf16 first, so that a checkpoint and its bf16 copy have the same identity;
    an int8 copy carries that of its source.

    Args:
        reader: the checkpoint.
        stored_names: name in the model -> name in the checkpoint.

    Returns:
        32 hexadecimal digits.
    """
    if IDENTITY_KEY in reader.metadata:
        return reader.metadata[IDENTITY_KEY]
    digest = hashlib.sha256()
    for name, stored in sorted(stored_names.items()):
        digest.update(f"{name}{reader.shapes[stored]}".encode())
        for sample in _samples(reader, stored):
            rounded = sample.to(torch.bfloat16).contiguous().view(torch.int16)
            digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()[:32]


def _samples(reader: CheckpointReader, name: str) -> Iterable[Tensor]:
    num_rows, *rest = (*reader.shapes[name], 1)
    num_columns = 1
    for size in rest:
        num_columns *= size
    rows_each = -(-_SAMPLE_ELEMENTS // max(1, num_columns))
    for place in range(_SAMPLED_PLACES):
        first = num_rows * place // _SAMPLED_PLACES
        values_RC = reader.rows(name, first, min(num_rows, first + rows_each))
        yield values_RC.reshape(-1)[:_SAMPLE_ELEMENTS]


@torch.no_grad()
def local_checksum(backbone: Backbone) -> str:
    """Checksum over every bit of the weights that this rank holds (its parts under ZeRO-3)."""
    sums = {}
    with phase("summing up the weights", len(backbone.tensors()), "tensors") as told:
        for name, held in backbone.held_tensors():
            sums[name] = _sums_of_bits(held)
            told.advance()
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()


def assert_unchanged(backbone: Backbone, checksum_before: str) -> None:
    """All ranks: the weights that each rank holds are those it held at `checksum_before`.

    Raises:
        InvariantError: on all ranks, if a weight moved on any.
    """
    moved = local_checksum(backbone) != checksum_before
    where = [rank for rank, changed in enumerate(ranks.gather_objects(moved)) if changed]
    if where:
        raise InvariantError(
            f"Backbone weights changed on ranks {where}, but only the prompt may train. "
            "The prompts of this run belong to no backbone; find what wrote to the weights."
        )


def _sums_of_bits(tensor: Tensor) -> tuple[int, int]:
    """A plain and a position-weighted sum of the bits, exact in wrapping int64."""
    flat = tensor.contiguous().view(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    if width == torch.int8 and flat.numel() % 8 == 0 and flat.data_ptr() % 8 == 0:
        width = torch.int64
    plain = weighted = 0
    for start, chunk in enumerate(flat.view(width).split(1 << 22)):
        values = chunk.to(torch.int64)
        positions = torch.arange(1, values.numel() + 1, device=values.device)
        plain += int(values.sum())
        weighted += int((values * positions).sum()) * (start + 1)
    return plain, weighted
