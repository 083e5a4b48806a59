"""Keys and values that an answer in the making looks at again with every token.

Axes: B batch, H heads, K key positions, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Heads = tuple[Tensor, Tensor]


@dataclass
class KeysValues:
    """Of one attention: (keys_BHKE, values_BHKE), or nothing yet."""

    grows: bool
    """Whether every call adds positions (self-attention), or all are there at once (cross)."""
    held: Heads | None = None

    def updated(self, compute: Callable[[], Heads]) -> Heads:
        """What to attend to, after `compute` gave what is new, where something is."""
        if self.held is None:
            self.held = compute()
        elif self.grows:
            new = compute()
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.held, new, strict=True))
            self.held = keys, values
        return self.held


@dataclass
class LayerMemory:
    """Of one decoder layer."""

    attended: KeysValues = field(default_factory=lambda: KeysValues(grows=True))
    encoded: KeysValues = field(default_factory=lambda: KeysValues(grows=False))
