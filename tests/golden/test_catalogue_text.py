"""The catalogue's text against T5's own, every record, character by character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softprompt_dist.data.catalogue.definition import is_labelled
from softprompt_dist.data.catalogue.registry import CATALOGUE

DATA = Path(__file__).parent / "data"
FILES = {
    "superglue_boolq": "boolq",
    "superglue_cb": "cb",
    "superglue_copa": "copa",
    "superglue_multirc": "multirc",
    "superglue_record": "record",
    "superglue_rte": "rte",
    "superglue_wic": "wic",
    "superglue_wsc": "wsc",
    "glue_sst2": "sst2",
    "glue_mrpc": "mrpc",
    "glue_qqp": "qqp",
    "glue_mnli": "mnli",
    "glue_qnli": "qnli",
    "glue_rte": "glue_rte",
    "glue_stsb": "stsb",
    "glue_cola": "cola",
    "squad": "squad",
    "mrqa": "newsqa",
    "dpr": "dpr",
}
"""File -> the task that its records are of; MRQA's have no field that names their set."""
SHARED_TEXT = {"mnli_mismatched": "mnli"} | dict.fromkeys(
    ("textbookqa", "bioasq", "race", "relation_extraction", "duorc", "drop"), "newsqa"
)
"""Tasks without a file of their own -> the task whose text they share, prefix aside."""
NOT_OF_T5 = {"trec", "imdb", "ag_news"}
NO_GOLDEN = {"wnli"}
NO_TASKLESS_PREFIX = ("taskless_", "mrqa_bio_asq", "squad_v010")


def records(file: str) -> list[dict]:
    return list(map(json.loads, (DATA / f"{file}.jsonl").read_text("utf-8").splitlines()))


def originals(record: dict) -> dict[str, list[dict]]:
    """Name of T5's task -> what it made of the record, where the file has text of it."""
    made = {
        name: [outputs] if isinstance(outputs, dict) else outputs
        for name, outputs in record["outputs"].items()
    }
    return {name: outputs for name, outputs in made.items() if "task_index" not in name}


def forms(record: dict) -> dict[str, list[dict]]:
    """The record's rows as tensorflow-datasets has them and, where known, as the zips do."""
    decoded = record["tfds"] if isinstance(record["tfds"], list) else [record["tfds"]]
    return {"decoded": decoded} | ({"official": [record["raw"]]} if "raw" in record else {})


def test_every_task_is_compared():
    assert set(FILES.values()) | set(SHARED_TEXT) | NOT_OF_T5 | NO_GOLDEN == set(CATALOGUE)
    assert {path.stem for path in DATA.glob("*.jsonl")} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_text_is_that_of_t5(file):
    task = CATALOGUE[FILES[file]]
    compared = set()
    for record in records(file):
        for name, outputs in originals(record).items():
            prefix = "" if name.startswith(NO_TASKLESS_PREFIX) else task.prefix
            expected = [(output["inputs"], output["targets"]) for output in outputs]
            for form, rows in forms(record).items():
                made = [e for row in rows for e in task.to_examples(row, name.endswith("_train"))]
                assert [(prefix + e.input_text, e.target_text) for e in made] == expected
                compared.add((name, form))
    first = records(file)[0]
    assert len(compared) == len(originals(first)) * len(forms(first))


@pytest.mark.parametrize("file", FILES)
def test_facts_are_those_that_t5_passes_on(file):
    task = CATALOGUE[FILES[file]]
    for record in records(file):
        outputs = next(o for n, o in originals(record).items() if not n.endswith("_train"))
        for rows in forms(record).values():
            made = [e.facts for row in rows for e in task.to_examples(row, False)]
            assert made == [expected_facts(task.name, output) for output in outputs]


def expected_facts(task: str, output: dict) -> dict:
    facts = {}
    if "idx/question" in output:
        facts["group"] = f"{output['idx/paragraph']}-{output['idx/question']}"
    if "idx/query" in output:
        facts["group"] = f"{output['idx/passage']}-{output['idx/query']}"
    if "answers" in output:
        facts["answers"] = output["answers"]
    if task == "wsc":
        facts["label"] = output["label"]
    if output["targets"] == "-1.0":
        facts["label"] = -1
    return facts


@pytest.mark.parametrize("file", FILES)
def test_rows_without_a_label_are_known(file):
    task = CATALOGUE[FILES[file]]
    for record in records(file):
        (rows, *_) = forms(record).values()
        unlabelled = record.get("split") == "test" or rows[0].get("label", 0) == -1
        unlabelled |= rows[0].get("answers", True) == []
        examples = [e for row in rows for e in task.to_examples(row, False)]
        assert {is_labelled(e) for e in examples} == {not unlabelled}


@pytest.mark.parametrize(("task", "like"), SHARED_TEXT.items())
def test_sets_of_one_kind_share_their_text(task, like):
    file = next(file for file, name in FILES.items() if name == like)
    for record in records(file):
        made, expected = (
            list(CATALOGUE[name].to_examples(record["tfds"], True)) for name in (task, like)
        )
        assert made == expected
