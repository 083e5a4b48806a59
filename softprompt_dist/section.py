"""A group of settings, and the groups that every kind of run shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BatchConfig(Section):
    """How many examples make an update, and how many fit a device at once."""

    global_batch_size: Positive = 32
    micro_batch_size: Positive = 4


class CheckpointConfig(Section):
    """What is saved for a resume."""

    every_steps: Positive = 1000
    keep_last: Positive = 3
