"""What the catalogue knows of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from softprompt_dist.data.examples import Example

Row = Mapping[str, Any]
ToExamples = Callable[[Row, bool], Iterator[Example]]
"""(row, for_training) -> the row's taskless examples, their ids left empty. One row may give
several (MultiRC, ReCoRD) or none (another set's of MRQA; in training, WSC's wrong referents). A row
without a label gives the target `<unk>` (T5). Raises ValueError where the row is not as it must be.
"""

UNLABELLED = "<unk>"
"""T5's target of a row without a label."""


def is_labelled(example: Example) -> bool:
    """Whether the example's target is known, so that it can train a prompt or be scored.

    Two of T5's tasks write another target than `<unk>` where the label is missing: WSC the referent
    that is asked about, STS-B the number -1.0; they have a `label` of -1 among their facts.
    """
    return example.target_text != UNLABELLED and example.facts.get("label") != -1


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub and the names of its labelled splits."""

    name: str
    subset: str | None
    revision: str | None
    train: str | None
    validation: str | None
    test: str | None


@dataclass(frozen=True)
class CatalogueTask:
    """A task whose text, labels and metrics are known by name."""

    name: str
    """As `softprompt tasks list` shows it, such as `boolq`."""
    title: str
    """One line: what is asked."""
    suite: str
    """superglue, glue, squad, mrqa or classification."""
    family: str
    """What kind of answer a prompt for it gives, such as `entailment`; see `prompt_families`."""
    prefix: str
    """What T5 puts before the text, such as `boolq `, with the space; may be empty."""
    to_examples: ToExamples
    labels: tuple[str, ...]
    """Target texts; empty for free text."""
    metrics: tuple[str, ...]
    """Names of `softprompt_dist.metrics`; the task's score is the mean of what they name."""
    hub: HubSource
    fields: tuple[str, ...]
    """A row's fields that are read (besides the label)."""
    folder: str | None = None
    """The folder in the official SuperGLUE zips, such as `BoolQ`."""
    source: str = ""
    """Where text and metric come from, such as T5's `super_glue_boolq_v102`."""
