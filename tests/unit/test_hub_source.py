"""The hub client also loads a local folder by its path: the same code, without a network."""

import json

import datasets
import pytest

from softprompt_dist.data.tasks import load_task
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig, TaskConfig


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in {"train": 40, "validation": 5}.items():
        rows = [{"text": f"{split} {n}", "answer": n % 2 == 0} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def load(name, **splits):
    source = SourceConfig(kind="hub", name=name, **splits)
    labels = {"true": "True", "false": "False"}
    return load_task(TaskConfig(source=source, label_field="answer", labels=labels))


def test_splits_are_taken_by_their_hub_names(hub_folder):
    data = load(hub_folder, train="train", test="validation")
    assert {e.input_text: e.target_text for e in data.test} == {
        f"validation {n}": str(n % 2 == 0) for n in range(5)
    }
    assert len(data.train) + len(data.validation) == 40
    assert load(hub_folder).train  # the split called train, if none is named


def test_an_unknown_split_names_the_nearest(hub_folder):
    with pytest.raises(DataError, match="no split 'valid'. Did you mean 'validation'"):
        load(hub_folder, train="train", test="valid")


def test_an_unknown_data_set_is_a_message(tmp_path):
    with pytest.raises(DataError, match="Cannot load data set"):
        load(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"task\.source\.name is not given"):
        load(None)
