"""Lines and journal survive every kind of end, whatever answers the rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.batching import TokenExample, Tokenised
from softprompt_dist.data.tasks import task_reader
from softprompt_dist.errors import DataError, MachineError, SoftpromptError
from softprompt_dist.identity import Identity
from softprompt_dist.run import prediction_desk
from softprompt_dist.run.prediction_desk import PredictionDesk, PredictionRequest
from softprompt_dist.run.scoring import Prediction
from tests import runs

BLOCK = 3
NO_TOKEN = "..."


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power, and a thousand attempts need not say where they ran."""
    monkeypatch.setattr(prediction_desk, "describe_environment", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def encode(texts: Sequence[str]) -> Tokenised:
    if NO_TOKEN in texts:
        raise DataError("no token")
    examples = tuple(TokenExample(tuple(text.encode()), ()) for text in texts)
    return Tokenised(examples, sum(len(text) > 30 for text in texts))


def answers(blocks: Sequence[Sequence[TokenExample]]) -> list[Prediction]:
    """Like sums of a batch, these depend on what else is in the block."""
    found = []
    for block in blocks:
        seen = hashlib.sha256(repr([e.input_ids for e in block]).encode()).hexdigest()[:4]
        found += [Prediction(f"{seen}é", (float(len(e.input_ids)),)) for e in block]
    return found


@dataclass
class Job:
    """A command that can be started several times."""

    folder: Path
    input: Path
    settings: dict[str, Any] = field(default_factory=dict)
    window: int = 6
    weights: str = "those"

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def journal(self) -> Path:
        return self.folder / "out.jsonl.progress"

    def run(self, *, windows: int | None = None, fresh: bool = False) -> int:
        """Number of windows that were answered; ends after `windows` of them as if killed."""
        prompt = self.folder / "prompt"
        prompt.write_bytes(b"prompt")
        config = TuneConfig.model_validate({"task": self.settings})
        request = PredictionRequest(
            prompt, self.input, self.output, window=self.window, block_rows=BLOCK, fresh=fresh
        )
        desk = PredictionDesk(config, request, task_reader(config.task))
        try:
            return self._answer(desk, windows)
        finally:
            desk.output.close()

    def _answer(self, desk: PredictionDesk, windows: int | None) -> int:
        if desk.open():
            return 0
        blocks, done = desk.next_blocks(encode), 0
        desk.begin(Identity("t5", self.weights))
        while blocks is not None and done != windows:
            desk.write(answers(blocks), ["label"])
            blocks = desk.next_blocks(encode)
            done += 1
        if blocks is None:
            desk.finish()
        return done

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def refused(self, **options: Any) -> str:
        """The message; neither output nor journal is touched."""
        before = self.content()
        with pytest.raises(SoftpromptError) as error:
            self.run(**options)
        assert self.content() == before
        return str(error.value)

    def content(self) -> list[bytes]:
        return [path.read_bytes() for path in (self.output, self.journal) if path.exists()]


def make_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"r{n}"} for n in range(count)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of 14 rows: two whole windows, and a third whose last block is not full."""
    return Job(tmp_path, runs.write_rows(tmp_path / "in.jsonl", make_rows(14)))


@pytest.fixture
def whole(job: Job, tmp_path: Path) -> bytes:
    """What the job writes where nothing disturbs it."""
    folder = tmp_path / "whole"
    folder.mkdir()
    other = replace(job, folder=folder)
    assert other.run() == 3
    return other.output.read_bytes()


def totals(job: Job) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(job.journal.read_text().splitlines()[-1])["complete"]
    return {name: last[name] for name in ("rows", "predictions", "bad_rows", "truncated_inputs")}


def test_a_line_for_every_row_in_order(job: Job) -> None:
    job.run()
    assert [line["row"] for line in job.lines()] == list(range(1, 15))
    assert job.lines()[6] == {
        "row": 7,
        "id": "7",
        "prediction": job.lines()[8]["prediction"],
        "label_scores": {"label": 2.0},
    }
    assert totals(job) == {"rows": 14, "predictions": 14, "bad_rows": 0, "truncated_inputs": 0}


@pytest.mark.parametrize("window", [1, 3, 4, 9, 100])
def test_windows_change_nothing(job: Job, whole: bytes, window: int) -> None:
    job.window = window
    job.run()
    assert job.output.read_bytes() == whole


@pytest.mark.parametrize("windows", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 6, 9])
def test_killed_between_windows_and_continued_with_others(
    job: Job, whole: bytes, windows: int, window: int
) -> None:
    assert job.run(windows=windows) == windows
    job.window = window
    job.run()
    assert job.output.read_bytes() == whole
    assert totals(job)["rows"] == 14


def test_the_output_cut_anywhere(job: Job) -> None:
    runs.write_rows(job.input, make_rows(8))
    job.run()
    whole, journal = job.content()
    for size in range(len(whole)):
        job.output.write_bytes(whole[:size])
        job.journal.write_bytes(journal)
        assert job.run() > 0
        assert job.content() == [whole, journal], size


def test_the_journal_cut_anywhere(job: Job) -> None:
    """As when a run is killed after a window has been written and before it is noted."""
    runs.write_rows(job.input, make_rows(8))
    job.run()
    whole, journal = job.content()
    header = journal.index(b"\n") + 1
    ends = [end for end in range(1, len(journal)) if journal[end - 1 : end] == b"\n"]
    for size in {*range(0, len(journal), 9), *ends, *(end - 1 for end in ends)}:
        job.output.write_bytes(whole)
        job.journal.write_bytes(journal[:size])
        if size < header:
            assert "--fresh" in job.refused()
            continue
        job.run()
        assert job.content() == [whole, journal], size


def test_rows_of_several_answers_cut_anywhere(job: Job) -> None:
    rows = [
        {"context": f"c{n}", "qas": [{"question": f"q{m}"} for m in range(n % 3)]} for n in range(7)
    ]
    runs.write_rows(job.input, rows)
    job.settings = {"catalogue": "bioasq"}
    job.run()
    whole, journal = job.content()
    shown = [(line["row"], line.get("id")) for line in job.lines()]
    assert shown[:5] == [(1, None), (2, "2"), (3, "3.0"), (3, "3.1"), (4, None)]
    assert job.lines()[0] == {"row": 1, "prediction": None}
    for size in range(len(whole)):
        job.output.write_bytes(whole[:size])
        job.journal.write_bytes(journal)
        job.run()
        assert job.content() == [whole, journal], size


def test_a_complete_output_is_left_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.run()
    before = job.content()
    monkeypatch.setattr("softprompt_dist.run.prediction_rows.rows_digest", None)
    assert job.run() == 0
    assert job.content() == before


def test_a_complete_output_of_a_file_that_was_copied(job: Job) -> None:
    job.run()
    before = job.content()[0]
    job.input = Path(shutil.copy(job.input, job.folder / "copy.jsonl"))
    assert job.run() == 0
    assert job.content()[0] == before


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv", "csv.gz", "parquet"])
def test_other_files_of_the_same_rows(job: Job, whole: bytes, kind: str) -> None:
    """They may even change between two attempts: the rows count."""
    job.run(windows=1)
    rows, path = make_rows(14), job.folder / f"in.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        job.input.with_suffix(".csv").write_text("text\n" + "".join(f"{r['text']}\n" for r in rows))
        content = job.input.with_suffix(f".{kind.split('.')[0]}").read_bytes()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    job.input = path
    job.run()
    assert job.output.read_bytes() == whole


def test_an_input_that_has_grown_is_continued(job: Job, tmp_path: Path) -> None:
    for count in (14, 15, 17, 18, 20):
        runs.write_rows(job.input, make_rows(count))
        assert job.run() > 0
        folder = tmp_path / f"alone {count}"
        folder.mkdir()
        alone = replace(job, folder=folder)
        alone.run()
        assert job.output.read_bytes() == alone.output.read_bytes()
        assert totals(job)["rows"] == count


@pytest.mark.parametrize("windows", [2, None])
def test_rows_that_were_answered_must_stay(job: Job, windows: int | None) -> None:
    job.run(windows=windows)
    rows = make_rows(14)
    runs.write_rows(job.input, [*rows[:7], {"text": "other"}, *rows[8:]])
    message = job.refused()
    assert "Rows 7 to 12 of in.jsonl are not those that were answered" in message
    assert "--fresh" in message
    runs.write_rows(job.input, rows[:8])
    assert "Rows 7 to 12" in job.refused()


def test_other_settings_are_refused_and_named(job: Job) -> None:
    job.run(windows=1)
    job.settings = {"input_template": "It: {text}", "target_separator": "-"}
    message = job.refused()
    assert "task.input_template: '{text}' then, 'It: {text}' now" in message
    assert "task.target_separator: None then, '-' now" in message
    assert "task.labels" not in message
    assert "--fresh" in message


def test_settings_that_only_say_what_may_go_wrong_are_free(job: Job, whole: bytes) -> None:
    job.run(windows=1)
    job.settings = {"skip_bad_rows": True, "name": "other"}
    job.run()
    assert job.output.read_bytes() == whole


def test_a_journal_of_release_0_1_is_continued_by_the_weights_it_names(
    job: Job, whole: bytes
) -> None:
    job.run(windows=1)
    first, *rest = job.journal.read_text().splitlines(keepends=True)
    values = json.loads(first)
    values["made_for"]["backbone"] = values["made_for"].pop("identity")["weights"]
    values["made_for"]["tokenizer"] = "of the vocabulary"
    job.journal.write_text("".join([json.dumps(values) + "\n", *rest]))
    assert "weights: those there, others here" in replace(job, weights="others").refused()
    job.run()
    assert job.output.read_bytes() == whole


def test_other_weights_are_refused_before_anything_is_cut(job: Job) -> None:
    job.run(windows=1)
    job.output.write_bytes(job.output.read_bytes() + b"half a li")
    job.weights = "others"
    assert "weights: those there, others here" in job.refused()


def test_an_output_that_was_changed_is_refused(job: Job, whole: bytes) -> None:
    job.run(windows=2)
    job.output.write_bytes(b"?" + job.output.read_bytes()[1:])
    assert "has been changed" in job.refused()
    assert job.run(fresh=True) == 3
    assert job.output.read_bytes() == whole
    job.output.write_bytes(whole + b'{"row": 15}\n')
    assert "is longer than what was written" in job.refused()


def test_an_output_of_another_origin_is_refused(job: Job, whole: bytes) -> None:
    job.output.write_text("precious\n")
    assert "is there already" in job.refused()
    job.run(fresh=True)
    assert job.output.read_bytes() == whole


def test_fresh_replaces_only_once_all_has_been_checked(job: Job) -> None:
    job.run()
    runs.write_rows(job.input, [{"txt": "r0"}])
    assert "no field 'text'" in job.refused(fresh=True)


def test_one_run_at_a_time(job: Job) -> None:
    job.run(windows=1)
    other = prediction_desk.PredictionOutput(job.output)
    other.open()
    assert "Another process is writing" in job.refused()
    other.close()
    assert job.run() == 2


def test_a_bad_row_in_the_first_window(job: Job) -> None:
    rows = make_rows(14)
    runs.write_rows(job.input, [rows[0], {"text": None}, *rows[2:4], {"label": "apple"}])
    with job.input.open("a") as file:
        file.write('{"text": "half\n')
    message = job.refused()
    assert "3 of rows 1 to 6 cannot be used" in message
    for part in ("Line 2 of in.jsonl", "text is null", "no field 'text'", "Line 6 of in.jsonl is"):
        assert part in message
    assert "--skip-bad-rows" in message
    assert not job.output.exists()


def test_a_bad_row_further_on_keeps_what_is_before_it(job: Job, whole: bytes) -> None:
    rows = make_rows(14)
    runs.write_rows(job.input, [*rows[:8], {"text": " "}, *rows[9:]])
    with pytest.raises(DataError, match=r"Line 9 of in.jsonl[^$]*The 6 rows before them are kept"):
        job.run()
    assert len(job.lines()) == 6
    runs.write_rows(job.input, rows)
    assert job.run() == 2
    assert job.output.read_bytes() == whole


def test_bad_rows_are_answered_by_their_error(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(14)
    bad = {1: {"text": None}, 7: {"text": NO_TOKEN}, 13: {}}
    runs.write_rows(job.input, [bad.get(n, row) for n, row in enumerate(rows)])
    job.settings = {"skip_bad_rows": True}
    job.run(windows=2)
    job.run()
    assert [line["row"] for line in job.lines()] == list(range(1, 15))
    errors = {line["row"]: line["error"] for line in job.lines() if "error" in line}
    assert list(errors) == [2, 8, 14]
    assert errors[8] == "Line 8 of in.jsonl: no token"
    assert totals(job) == {"rows": 14, "predictions": 11, "bad_rows": 3, "truncated_inputs": 0}
    assert "3 of 14 rows of in.jsonl cannot be used" in caplog.text
    assert all(error in caplog.text for error in errors.values())


def test_where_no_row_can_be_used_the_task_is_the_wrong_one(job: Job) -> None:
    runs.write_rows(job.input, [{"review": "good"}] * 14)
    job.settings = {"skip_bad_rows": True}
    assert "None of them is a row of task" in job.refused()


def test_inputs_that_were_cut_are_counted_over_all_attempts(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(14)
    rows[0]["text"] = rows[13]["text"] = "long " * 10
    runs.write_rows(job.input, rows)
    job.run(windows=1)
    assert caplog.text == ""
    job.run()
    assert caplog.text.count("2 of 14 inputs are longer") == 1


def test_a_file_that_breaks_off_is_answered_up_to_there(job: Job) -> None:
    """So the file is not read before the first answer is written."""
    lines = [json.dumps({"text": f"r{n}" * 20_000}) for n in range(14)]
    content = gzip.compress("\n".join(lines).encode(), compresslevel=0)
    job.input = job.folder / "in.jsonl.gz"
    job.input.write_bytes(content[:-20])
    with pytest.raises(DataError, match="Cannot read .*in.jsonl.gz"):
        job.run()
    assert len(job.lines()) == 12
    job.input.write_bytes(content)
    assert job.run() == 1
    assert len(job.lines()) == 14


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows(job: Job, content: str) -> None:
    job.input.write_text(content)
    assert "has no rows" in job.refused()
    assert not job.output.exists()


def test_places_that_cannot_be_written(job: Job) -> None:
    nowhere = job.folder / "file"
    nowhere.write_text("")
    for output, said in (
        (nowhere / "out.jsonl", "Cannot write"),
        (job.input, "is the file of --input"),
        (job.folder / "out.csv", "must end in .jsonl"),
    ):
        request = PredictionRequest(nowhere, job.input, output)
        config = TuneConfig()
        desk = PredictionDesk(config, request, task_reader(config.task))
        with pytest.raises((DataError, MachineError), match=said):
            desk.open()
        desk.output.close()
