"""Which vocabulary pieces a prompt has come to mean (Lester et al., 2021, section 7).

Axes: P prompt, D model width, V vocabulary, K neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_ROWS_AT_A_TIME = 64


class Neighbours(NamedTuple):
    """For each prompt row the nearest pieces, nearest first."""

    ids_PK: Tensor
    cosines_PK: Tensor
    """Cosine similarity, -1 to 1; 0 where a vector has no length."""


def nearest_pieces(prompt_PD: Tensor, table_VD: Tensor, num_neighbours: int) -> Neighbours:
    """The `num_neighbours` rows of the embedding table (at most V) nearest to each prompt row."""
    table_VD = functional.normalize(table_VD.float(), dim=-1)
    num_neighbours = min(num_neighbours, len(table_VD))
    tops = [
        (functional.normalize(rows.float(), dim=-1) @ table_VD.T).topk(num_neighbours)
        for rows in torch.split(prompt_PD, _ROWS_AT_A_TIME)
    ]
    cosines_PK = torch.cat([top.values for top in tops])
    return Neighbours(torch.cat([top.indices for top in tops]), cosines_PK)
