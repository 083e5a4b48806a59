"""A group of settings, and the groups that every kind of run shares."""

from __future__ import annotations

import os.path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_LIMIT = 2**63
Positive = Annotated[int, Field(ge=1, lt=_LIMIT)]
NotNegative = Annotated[int, Field(ge=0, lt=_LIMIT)]
PathName = Annotated[str, AfterValidator(os.path.expanduser)]
"""Of a file or folder; the home folder for `~` at its beginning."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys, NaN and infinite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class BatchConfig(Section):
    """How many examples make an update, and how many fit a device at once."""

    global_batch_size: Positive = 32
    micro_batch_size: Positive = 4


class CheckpointConfig(Section):
    """What is saved for a resume."""

    every_steps: Positive = 1000
    keep_last: Positive = 3


class HealthConfig(Section):
    """How a run notices that something is wrong with it; none of it changes what is learned."""

    step_timeout_seconds: Annotated[float, Field(gt=0)] = 240.0
    """A rank that computes no micro-batch for so long is taken for hung: all ranks write their
    stacks and end. Below Slurm's own limit for lost nodes (SlurmdTimeout, 300)."""
    slow_timeout_seconds: Annotated[float, Field(gt=0)] = 7200.0
    """The same for what takes longer: loading, the first step, saving."""
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How often `heartbeat.json` says that the run is alive."""
    spike_sigmas: Annotated[float, Field(gt=0)] = 6.0
    """A loss so many standard deviations above the mean of the last `spike_window` is flagged."""
    spike_window: Annotated[int, Field(ge=16)] = 128
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5
    """A rank whose steps take so many times the median rank's is named."""

    @property
    def longest_timeout_seconds(self) -> float:
        """Of both."""
        return max(self.step_timeout_seconds, self.slow_timeout_seconds)
