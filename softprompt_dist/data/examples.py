"""One example: what the model reads, what it should answer, and what a metric must know besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from softprompt_dist.data.rows import Place


@dataclass(frozen=True)
class Example:
    """What the model reads and what it should answer."""

    input_text: str
    target_text: str
    id: str = ""
    """Names the row it comes from; one row may give several examples."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a metric needs besides the target: `answers`, `group`, `label`; as JSON values."""
    where: Place | None = field(default=None, compare=False)
    """The row, for messages."""
