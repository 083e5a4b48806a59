"""What a metric judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A prediction beside its target; `facts` are those of the `Example`."""

    prediction: str
    target: str
    facts: Mapping[str, Any] = field(default_factory=dict)
