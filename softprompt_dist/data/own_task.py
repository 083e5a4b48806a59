"""A user's own task: a template for the text, a field and a map for the label."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from softprompt_dist.data.examples import Example
from softprompt_dist.data.reading import NoLabelError, ReadRow, as_text, check_unicode, value_of
from softprompt_dist.data.rows import Place, Row, listed, nearest
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import TaskConfig


@dataclass(frozen=True)
class OwnTask:
    """Reads rows as a recipe's template and label map say."""

    template: str
    fields: tuple[str, ...]
    """Those in the template."""
    label_field: str
    label_map: Mapping[str, str]
    """Empty: the label's own text is the target."""
    id_field: str | None
    metrics: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct target texts in the recipe's order; none for free text."""
        return tuple(dict.fromkeys(self.label_map.values()))

    @property
    def family(self) -> str:
        """Named by its label texts: prompts for the same ones are interchangeable."""
        return f"own: {', '.join(sorted(self.labels)) or 'free text'}"

    def read(self, row: Row, where: Place) -> ReadRow:
        """The row's one labelled example.

        Raises:
            DataError: what the row lacks; a `NoLabelError` if it is the label alone.
        """
        values = self._values(row, where)
        answers = self._answers(row, where)
        # The values, not the filled template: a new wording must not move rows between splits.
        split_text = "\n".join(values[field] for field in sorted(self.fields))
        facts = {} if self.label_map else {"answers": answers}
        row_id = self._id(row, where)
        name = row_id or str(where.row)
        example = Example(self._filled(values), answers[0], name, facts, where)
        return ReadRow((example,), split_text, row_id)

    def training_examples(self, row: Row, where: Place, read: ReadRow) -> tuple[Example, ...]:
        """The same one."""
        return read.examples

    def read_input(self, row: Row, where: Place) -> list[Example]:
        """The row's one example, with an empty target unless the row has a label of the map.

        Raises:
            DataError: what the row lacks besides a label.
        """
        values = self._values(row, where)
        try:
            target = self._answers(row, where)[0]
        except DataError:
            target = ""
        return [Example(self._filled(values), target, self._id(row, where) or str(where.row))]

    def _values(self, row: Row, where: Place) -> dict[str, str]:
        found = {field: value_of(row, field, where) for field in self.fields}
        nulls = [field for field, value in found.items() if value is None]
        values = {field: as_text(value) for field, value in found.items()}
        if nulls or not any(value.strip() for value in values.values()):
            which = f"{nulls[0]} is null" if nulls else ", ".join(self.fields)
            raise DataError(
                f"{where} has an empty text ({which}); every row needs one. Fill it in or remove "
                f"the row."
            )
        check_unicode("\n".join(values.values()), where)
        return values

    def _filled(self, values: Mapping[str, str]) -> str:
        parts = string.Formatter().parse(self.template)
        return "".join(text + (values[field] if field else "") for text, field, _, _ in parts)

    def _answers(self, row: Row, where: Place) -> list[str]:
        """The target texts, of which each is right, the one to train on first."""
        if not self.label_map:
            return _free_answers(row, self.label_field, where)
        value = value_of(row, self.label_field, where)
        label = as_text(value)
        if label in self.label_map:
            return [self.label_map[label]]
        if not label:
            raise NoLabelError(
                _no_label(where, self.label_field, "null" if value is None else "''")
            )
        raise DataError(
            f"{where} has the {self.label_field} {label!r:.100}, which is not in task.labels: "
            f"{listed(self.label_map)}.{nearest(label, self.label_map)} "
            f"Correct the row or add the label."
        )

    def _id(self, row: Row, where: Place) -> str | None:
        if self.id_field is None:
            return None
        name = as_text(value_of(row, self.id_field, where))
        if not name:
            raise DataError(
                f"{where} has no {self.id_field}, which task.id_field names. Fill it in, or remove "
                f"task.id_field: then the row's number is its id."
            )
        check_unicode(name, where)
        return name


def own_task(config: TaskConfig) -> OwnTask:
    """The reader of a task that is described by `config` itself.

    Raises:
        DataError: the template is malformed, or a target text is blank.
    """
    assert config.input_template is not None
    assert config.label_field is not None
    if blank := [key for key, target in config.labels.items() if not target.strip()]:
        raise DataError(f"task.labels.{blank[0]} is blank; the model needs a text to answer.")
    return OwnTask(
        config.input_template,
        _template_fields(config.input_template),
        config.label_field,
        config.labels,
        config.id_field,
        tuple(config.metrics) or (("accuracy",) if config.labels else ("squad",)),
    )


def _template_fields(template: str) -> tuple[str, ...]:
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
    return tuple(dict.fromkeys(fields))


def _free_answers(row: Row, field: str, where: Place) -> list[str]:
    value = row.get(field)
    if not isinstance(value, list):
        value = value_of(row, field, where)
    answers = value if isinstance(value, list) else [value]
    if any(isinstance(answer, (list, dict, bytes)) for answer in answers):
        raise DataError(f"{where}: {field} must be a text or a list of texts, not {value!r:.80}.")
    texts = [as_text(answer) for answer in answers]
    if not texts or not all(text.strip() for text in texts):
        raise NoLabelError(_no_label(where, field, repr(value)))
    check_unicode("\n".join(texts), where)
    return texts


def _no_label(where: Place, field: str, value: str) -> str:
    return f"{where} has no label: {field} is {value:.100}. Fill it in or remove the row."
