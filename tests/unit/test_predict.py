"""`softprompt predict` on a backbone: the answers of `evaluate`, and what it says of mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist import evaluate, predict
from softprompt_dist.prompt.file import load_prompt, save_prompt
from softprompt_dist.run import prediction
from tests import runs
from tests.messages import Said, assert_message
from tests.prompts import save_untuned

pytestmark = pytest.mark.usefixtures("lone_process")


@pytest.fixture(scope="module")
def prompt(lively_t5: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file in what looks like its run directory."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = runs.tiny_recipe(lively_t5, tiny_data)
    recipe["evaluation"]["length_normalisation"] = "tokens"
    return save_untuned(folder, recipe)


@pytest.fixture
def options(prompt: Path, tiny_data: Path, tmp_path: Path) -> list[str | Path]:
    output = tmp_path / "new" / "out.jsonl"
    return ["--prompt", prompt, "--input", tiny_data / "test.jsonl", "--output", output]


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """None may be loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr(prediction, "build_bench", refuse)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def output_of(options: list[str | Path]) -> Path:
    return Path(options[options.index("--output") + 1])


@pytest.mark.parametrize("method", ["rank", "greedy"])
def test_the_answers_are_those_of_evaluate(
    said: Said, options: list[str | Path], tmp_path: Path, method: str
) -> None:
    code, out, _ = said(predict.main, *options, "--method", method)
    assert code == 0
    assert "21 rows, 21 predictions" in out
    arguments = ["--split", "test", "--method", method, "--output", tmp_path / "scored"]
    assert said(evaluate.main, *options[:2], *arguments)[0] == 0
    scored = {line["id"]: line for line in lines(tmp_path / "scored" / "predictions.jsonl")}
    predicted = lines(output_of(options))
    assert len({line["prediction"] for line in predicted}) > 1
    assert [line["row"] for line in predicted] == list(range(1, 22))
    for line in predicted:
        expected = scored.pop(line["id"])
        assert line["prediction"] == expected["prediction"]
        assert ("label_scores" in line) == (method == "rank")
        if method == "rank":
            assert line["label_scores"] == pytest.approx(expected["label_scores"], rel=1e-5)
    assert not scored


def test_rows_need_no_label_and_windows_change_no_byte(
    said: Said, options: list[str | Path], tmp_path: Path
) -> None:
    rows = [{"text": row["text"]} for row in runs.make_rows(1300, seed=3)]
    options[3] = runs.write_rows(tmp_path / "many.jsonl", rows)
    assert said(predict.main, *options)[0] == 0
    whole = output_of(options).read_bytes()
    assert whole.count(b"\n") == 1300
    assert said(predict.main, *options, "--fresh", "--window", "513")[0] == 0
    assert output_of(options).read_bytes() == whole
    # As if it had been killed in the second window, while its lines were being written.
    journal = output_of(options).with_name("out.jsonl.progress")
    content = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(content[:2]) + content[2][:30])
    output_of(options).write_bytes(whole[: len(whole) * 9 // 10])
    code, out, _ = said(predict.main, *options)
    assert code == 0
    assert "continues after row 1024" in out
    assert output_of(options).read_bytes() == whole


@pytest.mark.usefixtures("no_backbone")
def test_nothing_is_loaded_for_a_bad_row(
    said: Said, options: list[str | Path], tmp_path: Path
) -> None:
    options[3] = tmp_path / "in.jsonl"
    options[3].write_text('{"text": "a river"}\n{"text": null}\n{"text": \n')
    message = said(predict.main, *options)
    assert_message(message, "Line 2 of in.jsonl", "Line 3 of in.jsonl is not JSON")
    assert not output_of(options).exists()


def test_bad_rows_may_be_left_out_and_long_ones_are_counted(
    said: Said, options: list[str | Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options[3] = runs.write_rows(tmp_path / "in.jsonl", [{"text": "a river " * 40}, {"txt": "b"}])
    assert said(predict.main, *options, "--skip-bad-rows")[0] == 0
    first, second = lines(output_of(options))
    assert first["prediction"] in runs.ANSWERS.values()
    assert second["row"] == 2
    assert "Did you mean 'txt'" in second["error"]
    assert caplog.text.count("1 of 1 inputs are longer than backbone.max_input_tokens=48") == 1
    assert caplog.text.count("1 of 2 rows of in.jsonl cannot be used") == 1


def test_a_complete_output_needs_no_backbone(
    said: Said, options: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(predict.main, *options)[0] == 0
    before = output_of(options).read_bytes()
    monkeypatch.setattr(prediction, "locate_backbone", None)
    code, out, _ = said(predict.main, *options)
    assert code == 0
    assert "is complete already" in out
    assert output_of(options).read_bytes() == before


def test_another_prompt_is_refused(
    said: Said, options: list[str | Path], prompt: Path, tmp_path: Path
) -> None:
    assert said(predict.main, *options)[0] == 0
    weight_PD, metadata = load_prompt(prompt)
    config = prompt.parents[1] / "config.yaml"
    shutil.copy(config, tmp_path)
    options[1] = tmp_path / "prompt" / "other.safetensors"
    save_prompt(options[1], weight_PD + 1, metadata)
    outcome = said(predict.main, *options)
    assert_message(outcome, "other settings", "prompt (sha256)", "--fresh")
    assert said(predict.main, *options, "--fresh")[0] == 0


@pytest.mark.usefixtures("no_backbone")
@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--input", "{data}/tset.jsonl", ["tset.jsonl", "Did you mean 'test.jsonl'?"]),
        ("--input", "{tmp}/empty.jsonl", ["has no rows"]),
        ("--input", "{tmp}/rows.txt", ["must end in .jsonl, .csv, .parquet"]),
        ("--output", "{tmp}/empty.jsonl/out.jsonl", ["Cannot write", "--output"]),
        ("--output", "{data}/test.jsonl", ["is the file of --input"]),
        ("--output", "{tmp}", ["must end in .jsonl"]),
        ("--window", "0", ["must be a whole number of at least 1"]),
        ("--task", "squad", ["free text", "greedy"]),
        ("--task", "bolq", ["'boolq'"]),
        ("--prompt", "{tmp}/none.safetensors", ["does not exist"]),
    ],
)
def test_mistakes_are_said_before_a_backbone_is_loaded(
    said: Said, options: list[str | Path], option: str, value: str, parts: list[str]
) -> None:
    data, folder = Path(options[3]).parent, output_of(options).parents[1]
    (folder / "empty.jsonl").write_text("")
    (folder / "rows.txt").write_text("text\n")
    given = value.format(data=data, tmp=folder)
    assert_message(said(predict.main, *options, option, given), *parts)


def test_free_text_ends_after_64_tokens_and_another_task_is_warned_of(
    said: Said, options: list[str | Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "who?", "context": "we saw a green river"}]
    options[3] = runs.write_rows(tmp_path / "in.jsonl", rows)
    given = [*options, "--task", "squad", "--method", "greedy"]
    assert said(predict.main, *given)[0] == 0
    assert "answers of squad are of another kind" in caplog.text
    (line,) = lines(output_of(options))
    assert set(line) == {"row", "id", "prediction"}
    assert len(line["prediction"]) > 20
    few = ["--fresh", "--set", "evaluation.max_target_tokens=2"]
    assert said(predict.main, *given, *few)[0] == 0
    (short,) = lines(output_of(options))
    assert line["prediction"].startswith(short["prediction"])
    assert len(short["prediction"]) < len(line["prediction"])
