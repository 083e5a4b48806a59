"""What rank 0 does alone while all ranks predict: rows come in, lines go out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.reading import TaskReader
from softprompt_dist.data.token_table import TokenTable
from softprompt_dist.errors import DataError
from softprompt_dist.identity import Identity
from softprompt_dist.metrics.results import prompt_source
from softprompt_dist.run.environment import describe_environment
from softprompt_dist.run.prediction_journal import Totals
from softprompt_dist.run.prediction_output import PredictionOutput
from softprompt_dist.run.prediction_rows import (
    BLOCK_ROWS,
    Encode,
    InputRow,
    RowStream,
    Window,
    tokenised_window,
)
from softprompt_dist.run.scoring import Prediction

log = logging.getLogger(__name__)

DEFAULT_WINDOW = 8 * BLOCK_ROWS
_NUM_SHOWN = 5


@dataclass(frozen=True)
class PredictionRequest:
    """Which prompt is to answer which rows."""

    prompt_file: Path
    input: Path
    """jsonl, csv or parquet."""
    output: Path
    """jsonl."""
    window: int = DEFAULT_WINDOW
    """Rows between two writes; rounded up to whole blocks."""
    block_rows: int = BLOCK_ROWS
    fresh: bool = False
    """Replace what is in the output instead of continuing it."""
    force: bool = False
    """Accept a prompt that was tuned for another backbone."""


class PredictionDesk:
    """What rank 0 does alone: rows come in, lines go out."""

    def __init__(self, config: TuneConfig, request: PredictionRequest, reader: TaskReader) -> None:
        self.output = PredictionOutput(request.output, fresh=request.fresh)
        self._config = config
        self._request = request
        self._reader = reader
        self._rows: RowStream
        self._input_file: os.stat_result
        self._settings: dict[str, Any]
        self._window: Window

    def open(self) -> bool:
        """Find where to begin. Whether nothing is left to do.

        Raises:
            DataError: input or output cannot be used, or the output belongs to something else.
            MachineError: the output cannot be written.
        """
        request = self._request
        _check_paths(request)
        self._rows = RowStream(request.input, self._reader)
        self._input_file = request.input.stat()
        if self._rows.at_end():
            raise DataError(f"{request.input} has no rows. Give at least one.")
        self.output.open()
        self._settings = _settings(self._config, request, self._reader)
        self.output.check_made_for(self._settings)
        if self.output.completion(self._input_file) is not None:
            _say(f"{request.output} is complete already: it answers all of {request.input.name}.")
            return True
        self.output.resume(self._rows, request.block_rows)
        if self._rows.at_end():
            self.output.begin(self._settings)
            self.finish()
            return True
        return False

    def begin(self, backbone: Identity) -> None:
        """Cut off a half-written window. From here on the output belongs to this backbone.

        Raises:
            DataError: it belongs to another one.
            MachineError: it cannot be written.
        """
        self.output.begin(self._settings, backbone)
        kept = self.output.totals.rows
        start = f"continues after row {kept}" if kept else "starts"
        _say(f"{self._request.output} {start}: task {self._config.task.name}.")

    def next_blocks(self, encode: Encode) -> tuple[TokenTable, ...] | None:
        """The token ids of the next window of rows; None at the end.

        Raises:
            DataError: rows cannot be used and may not be left out, or the input cannot be read on.
        """
        size = self._request.block_rows
        rows = self._rows.take(-(-self._request.window // size) * size)
        if not rows:
            return None
        self._window = tokenised_window(rows, encode, size)
        self._check_rows()
        return self._window.blocks

    @property
    def doing(self) -> str:
        """What people are told while the window is answered."""
        rows = self._window.rows
        return f"answering rows {rows[0].number} to {rows[-1].number}"

    def write(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> None:
        """Add the lines of the window.

        Args:
            predictions: to the examples of the blocks, one after another.
            labels: whose scores a prediction may have.

        Raises:
            MachineError: they cannot be written.
        """
        window, before = self._window, self.output.totals
        bad = [row.error for row in window.rows if row.error is not None]
        totals = Totals(
            rows=before.rows + len(window.rows),
            predictions=before.predictions + len(predictions),
            rows_without_example=before.rows_without_example
            + sum(not row.examples and row.error is None for row in window.rows),
            bad_rows=before.bad_rows + len(bad),
            truncated_inputs=before.truncated_inputs + window.num_truncated,
            first_bad=(*before.first_bad, *bad)[:_NUM_SHOWN],
        )
        lines = "".join(prediction_lines(window.rows, predictions, labels)).encode()
        self.output.append(lines, window.sha256, totals)

    def finish(self, batch_tokens: int | None = None) -> None:
        """Note that all is done, and say what there is to say of it.

        Args:
            batch_tokens: positions that were scored at a time; None where nothing was left to do.
        """
        environment = describe_environment() | {"evaluation_batch_tokens": batch_tokens}
        self.output.finish(self._input_file, environment)
        totals, name = self.output.totals, self._request.input.name
        _say(f"{totals.rows} rows, {totals.predictions} predictions: {self._request.output}")
        if totals.truncated_inputs:
            log.warning(
                "%d of %d inputs are longer than backbone.max_input_tokens=%d and were cut.",
                totals.truncated_inputs,
                totals.predictions,
                self._config.backbone.max_input_tokens,
            )
        if totals.bad_rows:
            log.warning(
                "%d of %d rows of %s cannot be used and have an error instead of a prediction: %s",
                totals.bad_rows,
                totals.rows,
                name,
                " ".join(totals.first_bad),
            )

    def _check_rows(self) -> None:
        rows = self._window.rows
        bad = [row.error for row in rows if row.error is not None]
        # None that can be used to begin with: the task is another one, and all rows would be bad.
        is_wrong_task = rows[0].number == 1 and len(bad) == len(rows)
        if bad and (is_wrong_task or not self._config.task.skip_bad_rows):
            raise DataError(self._bad_rows_message(bad))

    def _bad_rows_message(self, bad: Sequence[str]) -> str:
        rows, kept = self._window.rows, self.output.totals.rows
        lines = "".join(f"\n  {error}" for error in bad[:_NUM_SHOWN])
        more = f"\n  and {len(bad) - _NUM_SHOWN} more." if len(bad) > _NUM_SHOWN else ""
        message = (
            f"{len(bad)} of rows {rows[0].number} to {rows[-1].number} cannot be used:{lines}{more}"
        )
        if len(bad) == len(rows):
            return f"{message}\nNone of them is a row of task {self._config.task.name}."
        rest = f" The {kept} rows before them are kept: it goes on there." if kept else ""
        return (
            f"{message}\nCorrect them, or have --skip-bad-rows write their error in place of a "
            f"prediction; then start the same command again.{rest}"
        )


def prediction_lines(
    rows: Sequence[InputRow], predictions: Sequence[Prediction], labels: Sequence[str]
) -> Iterator[str]:
    """The output's lines: at least one for every row, and one for every example.

    Args:
        rows: in the input's order.
        predictions: to their examples, one after another.
        labels: whose scores a prediction may have.
    """
    answers = iter(predictions)
    for row in rows:
        if row.error is not None:
            yield _line({"row": row.number, "error": row.error})
        elif not row.examples:
            yield _line({"row": row.number, "prediction": None})
        for example in row.examples:
            found = next(answers)
            values = {"row": row.number, "id": example.id, "prediction": found.text}
            if found.label_scores is not None:
                values["label_scores"] = dict(zip(labels, found.label_scores, strict=True))
            yield _line(values)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _check_paths(request: PredictionRequest) -> None:
    output = request.output
    if output.suffix != ".jsonl":
        raise DataError(f"--output {output} must end in .jsonl: lines of JSON are written.")
    for name, file in (("--input", request.input), ("--prompt", request.prompt_file)):
        if output.resolve() == file.resolve() or (output.exists() and output.samefile(file)):
            raise DataError(f"--output {output} is the file of {name}. Name another --output.")


def _settings(config: TuneConfig, request: PredictionRequest, reader: TaskReader) -> dict[str, Any]:
    """All that decides what is written, but for the rows and the backbone.

    evaluation.batch_tokens is not among it: after an out-of-memory error a run may go on with less.
    """
    task, backbone, evaluation = config.task, config.backbone, config.evaluation
    return {
        "prompt (sha256)": prompt_source(request.prompt_file).sha256,
        "task.catalogue": task.catalogue,
        "task.prefixed": task.prefixed,
        "task.input_template": task.input_template,
        "task.labels": list(reader.labels),
        "task.id_field": task.id_field,
        "task.append_eos": task.append_eos,
        "task.target_prefix": task.target_prefix,
        "task.target_separator": task.target_separator,
        "evaluation.method": evaluation.method,
        "evaluation.length_normalisation": evaluation.length_normalisation,
        "evaluation.max_target_tokens": evaluation.max_target_tokens,
        "backbone.prepend_bos": backbone.prepend_bos,
        "backbone.max_input_tokens": backbone.max_input_tokens,
        "backbone.dtype": backbone.dtype,
        "backbone.quantization": backbone.quantization,
        "backbone.quantized_layers": backbone.quantized_layers,
        "backbone.outlier_threshold": backbone.outlier_threshold,
        "rows in a block": request.block_rows,
    }


def _say(text: str) -> None:
    print(text, flush=True)
