"""Tasks of the catalogue out of files: ids, groups, prefixes, labels that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.data.rows import stream_rows
from softprompt_dist.data.tasks import TaskData, hash_split, load_task, task_reader
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig, TaskConfig

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(
    tmp_path: Path, catalogue: str, rows: Rows, splits: Any = ("validation",), **settings: Any
) -> TaskData:
    """All rows are the splits asked for, or the train split that lacking ones are taken from."""
    key = "train" if "train" in splits else splits[0]
    source = SourceConfig(**{key: write(tmp_path / "rows.jsonl", rows)})
    return load_task(TaskConfig(catalogue=catalogue, source=source, **settings), splits)


BOOLQ: Rows = [
    {"passage": f"It is {n}.", "question": f"is it {n}", "label": n % 2 == 0, "idx": 100 + n}
    for n in range(60)
]


def multirc_passage(number: int) -> dict[str, Any]:
    answers = [{"text": f"answer {n}", "idx": n, "label": n % 2} for n in range(3)]
    questions = [{"question": f"why {n}", "answers": answers, "idx": n} for n in range(2)]
    return {"idx": number, "passage": {"text": f"Passage {number}.", "questions": questions}}


def on_the_hub(passage: dict[str, Any]) -> Rows:
    """The rows of a passage in the hub's form: one an answer."""
    return [
        {
            "paragraph": passage["passage"]["text"],
            "question": question["question"],
            "answer": answer["text"],
            "label": answer["label"],
            "idx": {
                "paragraph": passage["idx"],
                "question": question["idx"],
                "answer": answer["idx"],
            },
        }
        for question in passage["passage"]["questions"]
        for answer in question["answers"]
    ]


def test_text_labels_metrics_and_ids_are_the_catalogues(tmp_path: Path) -> None:
    data = load(tmp_path, "boolq", BOOLQ)
    example = next(e for e in data.validation if e.id == "107")
    assert (example.input_text, example.target_text) == (
        "passage: It is 7. question: is it 7",
        "False",
    )
    assert (data.labels, data.metrics, data.family) == (("False", "True"), ("accuracy",), "yes_no")
    prefixed = load(tmp_path, "boolq", BOOLQ, prefixed=True)
    assert [e.input_text for e in prefixed.validation] == [
        "boolq " + e.input_text for e in data.validation
    ]


def test_absent_splits_are_made_by_the_taskless_text(tmp_path: Path) -> None:
    splits = ("train", "validation", "test")
    data = load(tmp_path, "boolq", BOOLQ, splits)
    for split in splits:
        assert {hash_split(e.input_text) for e in data.splits[split]} == {split}
    prefixed = load(tmp_path, "boolq", BOOLQ, splits, prefixed=True)
    assert [e.id for e in prefixed.test] == [e.id for e in data.test]


def test_examples_of_a_passage_stay_together_in_both_layouts(tmp_path: Path) -> None:
    passages = [multirc_passage(n) for n in range(40)]
    splits = ("train", "validation", "test")
    official = load(tmp_path, "multirc", passages, splits)
    hub = load(tmp_path, "multirc", [row for p in passages for row in on_the_hub(p)], splits)
    assert hub.digests == official.digests
    for split in splits:
        assert [e.facts for e in hub.splits[split]] == [e.facts for e in official.splits[split]]
        paragraphs = [e.input_text.partition("paragraph: ")[2] for e in official.splits[split]]
        changes = sum(a != b for a, b in zip(paragraphs, paragraphs[1:], strict=False))
        assert changes + 1 == len(set(paragraphs)) == len(paragraphs) / 6
    assert {e.id for e in official.test} >= {
        f"{official.test[0].id.split('.')[0]}.{n}" for n in "012345"
    }
    assert official.test[0].id != official.test[1].id
    assert len(hub.test[0].id.split(".")) == 3


def test_rows_that_are_not_trained_on_are_still_scored(tmp_path: Path) -> None:
    """WSC: a wrong referent is no target to learn, but a question to get right."""
    rows: Rows = [
        {
            "text": f"Mara asked Tom if he could lend her {n} coins .",
            "target": {
                "span1_text": ("Tom", "Mara")[n % 2],
                "span1_index": 2 - 2 * (n % 2),
                "span2_text": "he",
                "span2_index": 4,
            },
            "label": n % 2 == 0,
            "idx": n,
        }
        for n in range(60)
    ]
    data = load(tmp_path, "wsc", rows, ("train", "validation"))
    assert {e.facts["label"] for e in data.train} == {1}
    assert {e.facts["label"] for e in data.validation} == {0, 1}
    assert {e.id for e in data.train}.isdisjoint(e.id for e in data.validation)


def test_official_ids_differ(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"id 103 stands in lines 4 and 61 of rows\.jsonl"):
        load(tmp_path, "boolq", [*BOOLQ, BOOLQ[3]])
    rows = on_the_hub(multirc_passage(5))
    with pytest.raises(DataError, match=r"id 5\.1\.2 stands in lines 6 and 7 of rows\.jsonl"):
        load(tmp_path, "multirc", [*rows, rows[-1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": None}, "'question' is None"),
        ({"label": "perhaps"}, "'perhaps'"),
        ({"passage": ["a"]}, "'passage' is"),
        ({"question": "\ud83d"}, "half a character"),
        ({"label": None}, "has no label"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, "boolq", [*BOOLQ, BOOLQ[0] | {"idx": 1} | change])
    assert "Line 61 of rows.jsonl" in str(caught.value)
    assert words in str(caught.value)
    kept = load(tmp_path, "boolq", [*BOOLQ, BOOLQ[0] | change], skip_bad_rows=True)
    assert (len(kept.validation), kept.records["validation"].num_bad) == (60, 1)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Line 1 of rows\.jsonl is no row of boolq.*'passage'"):
        load(tmp_path, "boolq", [{"question": "why", "label": 1}])


def test_a_split_without_labels_is_refused_as_a_whole(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "label"} for row in BOOLQ]
    for skip_bad_rows in (False, True):
        with pytest.raises(DataError, match="'test' has no labels: none of the 60 rows of rows"):
            load(tmp_path, "boolq", rows, ("test",), skip_bad_rows=skip_bad_rows)


def test_rows_to_predict_need_no_label(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "label"} for row in BOOLQ[:2]]
    write(tmp_path / "in.jsonl", [*rows, {"question": "why"}])
    to_inputs = task_reader(TaskConfig(catalogue="boolq", prefixed=True)).read_input
    *good, bad = stream_rows(tmp_path / "in.jsonl")
    made = [example for row in good for example in to_inputs(row.row, row.where)]
    assert [(e.id, e.target_text) for e in made] == [("100", ""), ("101", "")]
    assert made[0].input_text == "boolq passage: It is 0. question: is it 0"
    with pytest.raises(DataError, match=r"Line 3 of in\.jsonl is no row of boolq"):
        to_inputs(bad.row, bad.where)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(DataError, match="'boolq'"):
        load_task(TaskConfig(catalogue="bolq"))
