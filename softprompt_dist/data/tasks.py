"""A task: rows of a source become pairs of input and target text, in three splits."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt_dist.data.examples import Example
from softprompt_dist.data.sources import SPLITS, Row, Rows, nearest, read_splits
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import TaskConfig

_NUM_BUCKETS = 10
_HASH_BUCKETS = {"test": 0, "validation": 1}


@dataclass(frozen=True)
class TaskData:
    """A task's examples; `labels` are the distinct target texts in the recipe's order.

    Each split is ordered by the sha256 of its rows' texts: a source may be sorted by label, and yet
    the first n of a split are a fair sample. `digests`: for each split the sha256 of its examples.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    digests: dict[str, str]


def load_task(config: TaskConfig) -> TaskData:
    """Read, fill in, check and split; without any collective.

    Raises:
        DataError: the source, the template, a row or a label is wrong, or a split has no rows.
    """
    fields = _template_fields(config.input_template)
    if blank := [key for key, target in config.labels.items() if not target.strip()]:
        raise DataError(f"task.labels.{blank[0]} is blank; the model needs a text to answer.")
    sources = read_splits(config.source)
    examples = _split_by_hash({s: _keyed(config, fields, r) for s, r in sources.items()})
    for split, chosen in examples.items():
        if not chosen:
            raise DataError(_no_rows(split, sources.get(split, sources["train"])))
    examples["train"] = examples["train"][: config.max_examples]
    return TaskData(
        name=config.name,
        labels=tuple(dict.fromkeys(config.labels.values())),
        digests={split: _digest(chosen) for split, chosen in examples.items()},
        **examples,
    )


def hash_split(text: str, absent: Sequence[str] = ("test", "validation")) -> str:
    """The split of a row whose source lacks the splits `absent`, from the row's text alone.

    Bucket = first 32 bits of the sha256 of the UTF-8 text, modulo 10: 0 is test, 1 validation, the
    rest train. Equal texts share a split, whatever the order, the template or the rest of the data.
    """
    bucket = int(_sha256(text)[:8], 16) % _NUM_BUCKETS
    return next((split for split in absent if _HASH_BUCKETS[split] == bucket), "train")


@dataclass(frozen=True)
class _Keyed:
    """An example and the text that decides its split."""

    example: Example
    split_text: str


def _split_by_hash(given: dict[str, list[_Keyed]]) -> dict[str, tuple[Example, ...]]:
    """The three splits, ordered by hash; those that are not given are taken out of train."""
    absent = [split for split in _HASH_BUCKETS if split not in given]
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for split, rows in given.items():
        for row in sorted(rows, key=lambda row: _sha256(row.split_text)):
            chosen = hash_split(row.split_text, absent) if split == "train" else split
            splits[chosen].append(row.example)
    return {split: tuple(examples) for split, examples in splits.items()}


def _template_fields(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"task.input_template {template!r} is malformed: {error}. Write a field's name in "
            f"braces; a brace itself is doubled."
        ) from error
    fields = [field for _, field, _, _ in parsed if field is not None]
    plain = all(not spec and conversion is None for _, _, spec, conversion in parsed)
    if not fields or "" in fields or not plain:
        raise DataError(
            f"task.input_template {template!r} must have fields such as {{text}}: a row's field "
            f"name in braces and nothing else."
        )
    return list(dict.fromkeys(fields))


def _keyed(config: TaskConfig, fields: Sequence[str], rows: Rows) -> list[_Keyed]:
    numbered = enumerate(rows.rows, 1)
    return [_keyed_row(config, fields, f"Row {n} of {rows.origin}", row) for n, row in numbered]


def _keyed_row(config: TaskConfig, fields: Sequence[str], where: str, row: Row) -> _Keyed:
    values = {field: _as_text(_field(row, field, where)) for field in fields}
    if not any(value.strip() for value in values.values()):
        raise DataError(
            f"{where} has an empty text ({', '.join(fields)}); every row needs one. Remove the row."
        )
    label = _as_text(_field(row, config.label_field, where))
    if label not in config.labels:
        raise DataError(
            f"{where} has the {config.label_field} {label!r}, which is not in task.labels: "
            f"{', '.join(config.labels)}.{nearest(label, config.labels)} "
            f"Correct the row or add the label."
        )
    # The values, not the filled template: rewording a template must not move rows between splits.
    split_text = "\n".join(values[field] for field in sorted(fields))
    _check_unicode(split_text, where)
    return _Keyed(Example(_fill(config.input_template, values), config.labels[label]), split_text)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a character: {error}. Correct or remove it.") from error


def _fill(template: str, values: dict[str, str]) -> str:
    parts = string.Formatter().parse(template)
    return "".join(text + (values[field] if field else "") for text, field, _, _ in parts)


def _field(row: Row, field: str, where: str) -> object:
    if field not in row:
        raise DataError(
            f"{where} has no field {field!r}.{nearest(field, row)} Its fields: {', '.join(row)}."
        )
    if isinstance(row[field], (list, dict)):
        raise DataError(
            f"{where}: field {field!r} is a {type(row[field]).__name__}; templates and labels take "
            f"text, numbers and true/false. Flatten it first."
        )
    return row[field]


def _as_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_text, example.target_text]).encode() + b"\n")
    return digest.hexdigest()


def _no_rows(split: str, rows: Rows) -> str:
    message = f"Split {split!r} has no rows: {rows.origin} has {len(rows.rows)}"
    if split == "train":
        return f"{message}, and training needs at least 1 that is in no other split."
    return (
        f"{message}, of which the hash of the text gives {split} about a tenth. Name rows of its "
        f"own in task.source.{split}, or add rows."
    )
