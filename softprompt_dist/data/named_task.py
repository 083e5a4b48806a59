"""A task of the catalogue as the loader needs it: places, ids and prefixes are added here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from softprompt_dist.data.catalogue.definition import CatalogueTask, is_labelled
from softprompt_dist.data.examples import Example
from softprompt_dist.data.reading import NoLabelError, ReadRow, as_text, check_unicode
from softprompt_dist.data.rows import Place, Row
from softprompt_dist.errors import DataError

_WRONG_ROW = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
_ID_FIELD = "idx"
"""As the official files and the hub name it: a number, or an object of numbers."""


@dataclass(frozen=True)
class NamedTask:
    """Reads rows as a task of the catalogue does."""

    task: CatalogueTask
    prefixed: bool

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's target texts; none for free text."""
        return self.task.labels

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics."""
        return self.task.metrics

    @property
    def family(self) -> str:
        """What kind of answer a prompt for it gives."""
        return self.task.family

    def read(self, row: Row, where: Place) -> ReadRow:
        """The row's labelled examples; none where it belongs to another task.

        Raises:
            DataError: what the row lacks; a `NoLabelError` if it is the label alone.
        """
        examples = self._examples(row, where, for_training=False)
        if not all(map(is_labelled, examples)):
            raise NoLabelError(f"{where} has no label. Add it or remove the row.")
        split_text = _passage(row, examples[0]) if examples else ""
        return ReadRow(self._finished(examples, row, where), split_text, _row_id(row, where))

    def training_examples(self, row: Row, where: Place, read: ReadRow) -> tuple[Example, ...]:
        """The row's examples to train on, which may be other ones (WSC)."""
        return self._finished(self._examples(row, where, for_training=True), row, where)

    def read_input(self, row: Row, where: Place) -> list[Example]:
        """The row's examples, with an empty target where it has no label.

        Raises:
            DataError: what the row lacks besides a label.
        """
        examples = self._finished(self._examples(row, where, for_training=False), row, where)
        return [e if is_labelled(e) else replace(e, target_text="") for e in examples]

    def _examples(self, row: Row, where: Place, *, for_training: bool) -> list[Example]:
        try:
            examples = list(self.task.to_examples(row, for_training))
        except _WRONG_ROW as error:
            raise DataError(
                f"{where} is no row of {self.task.name}: {error!s:.300}. Correct or remove it."
            ) from error
        for example in examples:
            check_unicode(example.input_text + example.target_text, where)
        return examples

    def _finished(self, examples: list[Example], row: Row, where: Place) -> tuple[Example, ...]:
        row_id = _row_id(row, where) or str(where.row)
        names = [row_id] if len(examples) == 1 else (f"{row_id}.{n}" for n in range(len(examples)))
        prefix = self.task.prefix if self.prefixed else ""
        return tuple(
            replace(example, input_text=prefix + example.input_text, id=name, where=where)
            for example, name in zip(examples, names, strict=True)
        )


def _row_id(row: Row, where: Place) -> str | None:
    """Such as 17, or 3.1.0 of paragraph 3, question 1, answer 0; None where the row has none."""
    try:
        row_id = ".".join(_parts(row.get(_ID_FIELD)))
    except RecursionError as error:
        raise DataError(f"{where} has an {_ID_FIELD} without end. Correct or remove it.") from error
    check_unicode(row_id, where)
    return row_id or None


def _parts(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _parts(part)
    elif isinstance(value, (str, int)):
        yield as_text(value)


def _passage(row: Row, example: Example) -> str:
    """The example's text; the passage, where several examples ask about one."""
    if "group" not in example.facts:
        return example.input_text
    passage = row.get("paragraph", row.get("passage"))
    return str(passage["text"] if isinstance(passage, Mapping) else passage)
