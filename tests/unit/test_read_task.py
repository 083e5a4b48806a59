"""What a run reads of a task: the splits it scores, and train for the floors where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.examples import Example
from softprompt_dist.data.tasks import TaskData
from softprompt_dist.errors import DataError
from softprompt_dist.run.loaded_task import TextReader, read_task
from softprompt_dist.task_config import TaskConfig
from tests import runs

LABELLED = [{"text": f"film {n}", "label": n % 2} for n in range(12)]
QUESTIONS = [
    {"question": f"who was {n}?", "context": "It was she.", "answers": ["she"]} for n in range(12)
]


def write_folder(folder: Path, **splits: Any) -> Path:
    for name, rows in splits.items():
        runs.write_rows(folder / f"{name}.jsonl", rows)
    return folder


def files(folder: Path, *names: str) -> dict[str, str]:
    return {"kind": "files", **{name: str(folder / f"{name}.jsonl") for name in names}}


def splits_of(splits: list[str], **config: Any) -> list[str]:
    return list(read_task(TaskConfig.model_validate(config), splits).splits)


def test_train_comes_along_for_the_floors(tmp_path: Path) -> None:
    write_folder(tmp_path, train=LABELLED, validation=LABELLED)
    source = files(tmp_path, "train", "validation")
    assert splits_of(["validation"], catalogue="sst2", source=source) == ["train", "validation"]


def test_a_source_without_train_has_no_floors(tmp_path: Path) -> None:
    source = files(write_folder(tmp_path, validation=LABELLED), "validation")
    assert splits_of(["validation"], catalogue="sst2", source=source) == ["validation"]


def test_a_folder_of_superglue_may_lack_train(tmp_path: Path) -> None:
    row = {"premise": "It rains.", "choice1": "wet", "choice2": "dry", "question": "effect"}
    rows = [{**row, "label": n % 2, "idx": n} for n in range(4)]
    write_folder(tmp_path / "COPA", val=rows)
    source = {"kind": "superglue", "path": str(tmp_path)}
    assert splits_of(["validation"], catalogue="copa", source=source) == ["validation"]


def test_free_text_has_no_floors_and_so_reads_no_train(tmp_path: Path) -> None:
    write_folder(tmp_path, train=[{"nothing": "of use"}], validation=QUESTIONS)
    source = files(tmp_path, "train", "validation")
    assert splits_of(["validation"], catalogue="squad", source=source) == ["validation"]


def test_referents_have_a_floor(tmp_path: Path) -> None:
    spans = {"span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 3}
    row = {"text": "Ann says that she knows", "target": spans, "label": True}
    write_folder(tmp_path, train=[row], validation=[row])
    source = files(tmp_path, "train", "validation")
    assert splits_of(["validation"], catalogue="wsc", source=source) == ["train", "validation"]


def test_a_message_names_its_task_where_there_are_several(tmp_path: Path) -> None:
    source = files(write_folder(tmp_path, validation=[{"text": "a"}]), "validation")
    config = TaskConfig.model_validate({"catalogue": "sst2", "source": source})
    with pytest.raises(DataError, match=r"^Split 'validation' has no labels"):
        read_task(config, ["validation"])
    with pytest.raises(DataError, match=r"^Task 'sst2': Split 'validation' has no labels"):
        read_task(config, ["validation"], of_several=True)


def test_a_split_taken_from_train_needs_it(tmp_path: Path) -> None:
    source = files(write_folder(tmp_path, validation=LABELLED), "validation")
    with pytest.raises(DataError, match=r"train is not given.* test is taken from it"):
        splits_of(["test"], catalogue="sst2", source=source)


def test_where_answers_end_depends_on_the_split_that_is_scored_alone() -> None:
    texts = {"train": "the old green river near we ate", "validation": "apple", "test": "a river"}
    splits = {
        name: (Example("x", text, facts={"answers": [text]}),) for name, text in texts.items()
    }
    data = TaskData("t", splits, (), ("squad",), "own: free text", {})

    def ends(names: list[str], **evaluation: Any) -> dict[str, int]:
        config = TuneConfig.model_validate({"evaluation": evaluation})
        task = TextReader(config, runs.train_tokenizer(), "seq2seq").load(TaskConfig(), data, names)
        assert task.rule.max_target_tokens == max(s.max_target_tokens for s in task.splits.values())
        return {name: split.max_target_tokens for name, split in task.splits.items()}

    together = ends(["train", "validation", "test"])
    assert len(set(together.values())) == 3
    assert ends(["test"]) == {"test": together["test"]}
    assert ends(["test", "train"], max_target_tokens=2) == {"test": 2, "train": 2}
