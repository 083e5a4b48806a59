"""The hub client also loads a local folder by its path: the same code, without a network."""

import json
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest

from softprompt_dist.data import sources, tasks
from softprompt_dist.data.catalogue.definition import HubSource
from softprompt_dist.data.catalogue.registry import find_task
from softprompt_dist.data.sources import SPLITS
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


def load(name, wanted=SPLITS, **splits):
    source = SourceConfig(kind="hub", name=name, **splits)
    labels = {"true": "True", "false": "False"}
    return load_task(TaskConfig(source=source, label_field="answer", labels=labels), wanted)


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


def test_only_the_splits_asked_for_must_be_named(hub_folder):
    data = load(hub_folder, ("test",), test="validation")
    assert list(data.splits) == ["test"]
    assert load(hub_folder, ("test",), train="absent", test="validation").splits == data.splits
    with pytest.raises(DataError, match=r"task\.source\.train is not given"):
        load(hub_folder, ("train",), test="validation")


def test_a_checksum_is_refused_where_a_revision_is_meant(hub_folder):
    with pytest.raises(DataError, match=r"task\.source\.revision fixes what is read"):
        load(hub_folder, train="train", sha256={"train": "0" * 64})


def test_what_was_loaded_is_recorded(hub_folder):
    record = load(hub_folder, train="train", revision="v2").records["train"]
    assert record.revision == "v2"
    assert record.fingerprint
    assert record.origin.endswith("set train")


def test_the_commit_is_read_off_the_addresses():
    address = f"hf://datasets/google/boolq@{'35b264d0' * 5}/data/train-00000.parquet"
    loaded = SimpleNamespace(info=SimpleNamespace(download_checksums={address: {}}))
    assert sources._commit(loaded) == "35b264d0" * 5
    assert sources._commit(SimpleNamespace(info=SimpleNamespace(download_checksums=None))) is None


@pytest.fixture
def boolq_on_hub(tmp_path, monkeypatch):
    """The catalogue's BoolQ with a folder as its data set on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "boolq"
    folder.mkdir()
    for split, count in {"train": 40, "validation": 5, "test": 3}.items():
        rows = [
            {
                "question": f"{split} {n}",
                "passage": "It is.",
                "idx": n,
                "label": -1 if split == "test" else n % 2,
            }
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub = HubSource(str(folder), None, None, "train", "validation", None)
    task = replace(find_task("boolq"), hub=hub)
    monkeypatch.setattr(tasks, "find_task", lambda name: task)
    return folder


def load_boolq(splits, **source):
    config = SourceConfig(kind="hub", **source)
    return load_task(TaskConfig(catalogue="boolq", source=config), splits)


def test_a_catalogues_task_needs_no_source(boolq_on_hub):
    data = load_task(TaskConfig(catalogue="boolq"), ("validation",))
    assert sorted(e.input_text for e in data.validation) == [
        f"passage: It is. question: validation {n}" for n in range(5)
    ]
    assert {e.id: e.target_text for e in data.validation}["1"] == "True"
    assert data.name == "boolq"


def test_a_hub_split_named_for_one_use_is_not_the_default_of_another(boolq_on_hub):
    data = load_boolq(SPLITS, test="validation")
    assert len(data.test) == 5
    assert len(data.train) + len(data.validation) == 40
    both = load_boolq(SPLITS, test="validation", validation="validation")
    assert (len(both.train), len(both.validation)) == (40, 5)


def test_a_data_set_may_lack_a_split_that_the_catalogue_knows(boolq_on_hub):
    (boolq_on_hub / "train.jsonl").unlink()
    config = TaskConfig(catalogue="boolq")
    assert list(load_task(config, ("validation",), if_there=("train",)).splits) == ["validation"]
    with pytest.raises(DataError, match=r"task\.source\.train is not given"):
        load_task(config, ("train",))
    with pytest.raises(DataError, match="no split 'train'"):
        load_boolq(("train",), train="train")


def test_many_rows_of_the_hub_come_in_order(boolq_on_hub, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_AT_A_TIME", 7)
    data = load_boolq(("train", "validation"), validation="validation", test="validation")
    places = {example.input_text: example.id for example in data.train}
    assert places == {f"passage: It is. question: train {n}": str(n) for n in range(40)}


def test_test_rows_of_the_hub_without_labels_are_refused(boolq_on_hub):
    with pytest.raises(DataError, match="'test' has no labels: none of the 3 rows"):
        load_boolq(("test",), test="test")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("ours", "part", "abc")),
        ({"name": "ours", "revision": "new"}, ("ours", "part", "new")),
        ({"name": "a/mirror"}, ("a/mirror", None, None)),
        ({"name": "a/mirror", "subset": "s"}, ("a/mirror", "s", None)),
    ],
)
def test_subset_and_revision_go_with_the_catalogues_data_set(monkeypatch, config, expected):
    asked = []

    def load_nothing(*names):
        asked.append(names)
        return {"dev": SimpleNamespace(info=SimpleNamespace(download_checksums=None))}

    monkeypatch.setattr(sources, "_load_from_hub", load_nothing)
    hub = HubSource("ours", "part", "abc", None, "dev", "dev")
    task = replace(find_task("boolq"), hub=hub)
    found = sources.open_splits(SourceConfig(kind="hub", **config), task)
    assert asked == [expected]
    assert list(found) == ["validation", "test"]
