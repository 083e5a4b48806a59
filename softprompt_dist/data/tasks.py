"""A task: rows of a source become pairs of input and target text, in splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from softprompt_dist.data.catalogue.definition import CatalogueTask
from softprompt_dist.data.catalogue.registry import find_task
from softprompt_dist.data.examples import Example
from softprompt_dist.data.named_task import NamedTask
from softprompt_dist.data.own_task import own_task
from softprompt_dist.data.reading import TaskReader
from softprompt_dist.data.rows import Place
from softprompt_dist.data.sources import SPLITS, HubNames, SplitSource, hub_names, open_splits
from softprompt_dist.data.split_reading import (
    HASH_BUCKETS,
    NUM_SHOWN,
    SplitContents,
    check_rows,
    hash_split,
    read_split,
)
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import TaskConfig

__all__ = [
    "SplitRecord",
    "TaskData",
    "hash_split",
    "hub_data_set",
    "load_task",
    "task_reader",
]

_WHAT_TRAIN_IS = {
    "files": "a path such as data/train.jsonl",
    "hub": "a split's name such as train",
    "superglue": "a file of the task such as train.jsonl, which is not there",
}


@dataclass(frozen=True)
class SplitRecord:
    """Where a split's examples come from, for the run's records."""

    origin: str
    num_rows: int
    """In the origin, bad ones too."""
    num_examples: int
    num_bad: int = 0
    """Rows of the origin that were left out."""
    bad: tuple[str, ...] = ()
    """What is wrong with the first of them."""
    sha256: str | None = None
    """Of the origin's file, in hex."""
    revision: str | None = None
    """The commit that was read, of a data set on the hub."""
    fingerprint: str | None = None
    """The hub client's, of what it loaded."""


@dataclass(frozen=True)
class TaskData:
    """A task's examples in those splits that were asked for.

    Each split is ordered by the sha256 of its rows' texts: a source may be sorted by label, and yet
    the first n of a split are a fair sample. Which splits are asked for changes
    none of them.
    """

    name: str
    splits: Mapping[str, tuple[Example, ...]]
    labels: tuple[str, ...]
    """The distinct target texts, in the recipe's or the catalogue's order; none for free text."""
    metrics: tuple[str, ...]
    """Names of `softprompt_dist.metrics`; the score is the mean of what they name."""
    family: str
    """What kind of answer a prompt for it gives."""
    digests: Mapping[str, str]
    """Split -> sha256 of its examples' texts."""
    records: Mapping[str, SplitRecord] = field(default_factory=dict)

    def provenance(self, split: str) -> dict[str, Any]:
        """Where a split's rows come from, and the digest of its examples, as JSON values."""
        return {**asdict(self.records[split]), "examples_sha256": self.digests[split]}

    def without(self, split: str, problems: Mapping[Place | None, str]) -> TaskData:
        """The same without the rows of `split` at these places, which count as bad ones."""
        kept = tuple(e for e in self.splits[split] if e.where not in problems)
        record = self.records[split]
        record = replace(
            record,
            num_examples=len(kept),
            num_bad=record.num_bad + len(problems),
            bad=(*record.bad, *problems.values())[:NUM_SHOWN],
        )
        return replace(
            self,
            splits={**self.splits, split: kept},
            digests={**self.digests, split: _digest(kept)},
            records={**self.records, split: record},
        )

    @property
    def train(self) -> tuple[Example, ...]:
        """The examples to tune with."""
        return self.splits["train"]

    @property
    def validation(self) -> tuple[Example, ...]:
        """The examples that choose the best prompt."""
        return self.splits["validation"]

    @property
    def test(self) -> tuple[Example, ...]:
        """The examples that nothing else has seen."""
        return self.splits["test"]


def load_task(
    config: TaskConfig, splits: Sequence[str] = SPLITS, *, if_there: Sequence[str] = ()
) -> TaskData:
    """Read, fill in, check and split; without any collective.

    A split that the source lacks is a tenth of train by hash of the text, and train is without that
    tenth whether it is asked for or not. Other splits that are not asked for are not read.

    Args:
        config: the task.
        splits: which are wanted.
        if_there: which are wanted besides, where the source has them.

    Raises:
        DataError: the source, the template, rows or labels are wrong, or a split has no rows.
    """
    task = _catalogue_task(config)
    reader = task_reader(config)
    sources = open_splits(config.source, task)
    wanted = {*splits, *(split for split in if_there if split in sources)}
    splits = [split for split in SPLITS if split in wanted]
    read = _read_needed(config, reader, sources, splits)
    check_rows(read.values(), skip_bad_rows=config.skip_bad_rows)
    origins = {split: read[split if split in sources else "train"] for split in splits}
    examples = {split: origins[split].examples(split) for split in splits}
    for split, chosen in examples.items():
        if not chosen:
            raise DataError(_no_examples(split, origins[split]))
    if "train" in examples:
        examples["train"] = _fair_part(examples["train"], config.max_examples)
    return TaskData(
        name=config.name,
        splits=examples,
        labels=reader.labels,
        metrics=reader.metrics,
        family=reader.family,
        digests={split: _digest(chosen) for split, chosen in examples.items()},
        records={split: _record(origins[split], len(examples[split])) for split in splits},
    )


def _fair_part(examples: tuple[Example, ...], count: int | None) -> tuple[Example, ...]:
    """`count` of them. Rows come by the hash of their text, but those of a passage together."""
    if count is not None and any("group" in example.facts for example in examples):
        examples = tuple(sorted(examples, key=lambda e: _digest([e])))
    return examples[:count]


def hub_data_set(config: TaskConfig) -> HubNames:
    """The data set on the hub that a task with such a source reads.

    Raises:
        DataError: none is named.
    """
    return hub_names(config.source, _catalogue_task(config))


def task_reader(config: TaskConfig) -> TaskReader:
    """What makes examples of a task's rows, one by one: `load_task` without a source.

    Raises:
        DataError: the template or the label map is wrong.
    """
    task = _catalogue_task(config)
    return own_task(config) if task is None else NamedTask(task, config.prefixed)


def _catalogue_task(config: TaskConfig) -> CatalogueTask | None:
    return None if config.catalogue is None else find_task(config.catalogue)


def _read_needed(
    config: TaskConfig,
    reader: TaskReader,
    sources: Mapping[str, SplitSource],
    asked: Sequence[str],
) -> dict[str, SplitContents]:
    absent = [split for split in HASH_BUCKETS if split not in sources]
    from_train = [split for split in asked if split in absent]
    needed = [split for split in SPLITS if split in asked and split not in absent]
    if from_train and "train" not in needed:
        needed.insert(0, "train")
    if "train" in needed and "train" not in sources:
        raise DataError(_no_train(config, from_train))
    return {
        split: read_split(
            split,
            sources[split],
            reader,
            absent=absent,
            asked=asked,
        )
        for split in needed
    }


def _no_train(config: TaskConfig, from_train: Sequence[str]) -> str:
    why = f" {from_train[0]} is taken from it unless it is given." if from_train else ""
    what = _WHAT_TRAIN_IS[config.source.kind]
    return f"task.source.train is not given; it must be {what}.{why}"


def _no_examples(split: str, contents: SplitContents) -> str:
    message = (
        f"Split {split!r} has no rows: {contents.source.origin} has "
        f"{contents.num_rows - contents.num_bad}"
    )
    if split == contents.split and split != "train":
        return f"{message} for this task. Give other rows in task.source.{split}."
    if split == "train":
        return f"{message}, and training needs at least 1 that is in no other split."
    return (
        f"{message}, of which the hash of the text gives {split} about a tenth. Name rows of its "
        f"own in task.source.{split}, or add rows."
    )


def _record(contents: SplitContents, num_examples: int) -> SplitRecord:
    source = contents.source
    return SplitRecord(
        source.origin,
        contents.num_rows,
        num_examples,
        contents.num_bad,
        tuple(contents.bad),
        contents.sha256,
        source.revision,
        source.fingerprint,
    )


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_text, example.target_text]).encode() + b"\n")
    return digest.hexdigest()
