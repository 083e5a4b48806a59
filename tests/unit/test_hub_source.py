"""The hub client also loads a local folder by its path: the same code, without a network."""

import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets.arrow_writer import ArrowWriter

from softprompt_dist.checks.job_files import check_task
from softprompt_dist.data import sources, tasks
from softprompt_dist.data.catalogue.definition import HubSource
from softprompt_dist.data.catalogue.registry import find_task
from softprompt_dist.data.lm.hub_source import hub_files
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


def test_a_folder_is_recorded_without_a_revision_and_refused_with_one(hub_folder):
    record = load(hub_folder, train="train").records["train"]
    assert record.revision is None
    assert record.fingerprint
    assert record.origin.endswith("set train")
    with pytest.raises(DataError, match=r"Revision 'v2' of .* which has no revisions. Remove"):
        load(hub_folder, train="train", revision="v2")
    with pytest.raises(DataError, match="which has no revisions"):
        hub_files(f"hub:{hub_folder}", split="train", revision="v2", field_name="text")
    (Path(hub_folder) / "state.json").touch()
    with pytest.raises(DataError, match="was written by save_to_disk"):
        load(hub_folder, train="train")


OLD, NEW = "0ad1" * 10, "5e3f" * 10


@pytest.fixture
def kept_copies(tmp_path, monkeypatch):
    """Makes the copies that `datasets` keeps of some commits of a/set, the last one the newest."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def keep(*directories, addresses=()):
        for age, directory in enumerate(reversed(directories)):
            folder = tmp_path / "cache" / "a___set" / "part" / "0.0.0" / directory
            folder.mkdir(parents=True)
            with ArrowWriter(path=str(folder / "set-train.arrow")) as writer:
                for number in range(40):
                    writer.write({"text": f"{directory} {number}", "answer": True})
                writer.finalize()
            splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=40)})
            info = datasets.DatasetInfo(
                features=writer._features,
                config_name="part",
                splits=splits,
                download_checksums={address: {} for address in addresses},
            )
            info.write_to_directory(str(folder))
            os.utime(folder, times=(1e9 - age, 1e9 - age))

    return keep


@pytest.mark.parametrize(
    ("revision", "read"), [(None, NEW), (NEW, NEW), (OLD, OLD), ("v1", OLD), ("refs/pr/2", OLD)]
)
def test_offline_the_revision_asked_for_is_read_and_recorded(kept_copies, tmp_path, revision, read):
    kept_copies(OLD, NEW)
    for name in ("v1", "refs/pr/2"):
        path = tmp_path / "hub" / "datasets--a--set" / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OLD)
    (tmp_path / "hub" / "datasets--a--set" / "snapshots" / OLD).mkdir(parents=True)
    data = load("a/set", ("train",), train="train", subset="part", revision=revision)
    assert {example.input_text[:40] for example in data.train} == {read}
    assert data.provenance("train")["revision"] == read

    file, *_ = hub_files("hub:a/set:part", split="train", revision=revision, field_name="text")
    (rows,) = file.rows(0, 0)
    assert file.record() == {"revision": read}
    assert rows.values[0].startswith(read)


@pytest.mark.parametrize("revision", [OLD, "main"])
def test_a_revision_that_cannot_be_had_offline_is_refused(kept_copies, revision):
    kept_copies(NEW)
    told = f"Revision {revision} of data set a/set cannot be had.*has kept is of {NEW}.*OFFLINE=0"
    with pytest.raises(DataError, match=told):
        load("a/set", ("train",), train="train", subset="part", revision=revision)
    with pytest.raises(DataError, match=told):
        hub_files("hub:a/set:part", split="train", revision=revision, field_name="text")
    source = SourceConfig(kind="hub", name="a/set", subset="part", revision=revision)
    assert told[:20] in check_task(TaskConfig(source=source)).remedy
    kept = source.model_copy(update={"revision": NEW})
    assert check_task(TaskConfig(source=kept)).found == f"a/set at {NEW}: on this machine"


def test_older_copies_tell_their_commit_by_the_addresses_of_their_files(kept_copies):
    kept_copies("0123456789abcdef", addresses=[f"hf://datasets/a/set@{OLD}/train.parquet"])
    data = load("a/set", ("train",), train="train", subset="part", revision=OLD)
    assert data.records["train"].revision == OLD
    with pytest.raises(DataError, match=f"has kept is of {OLD}"):
        load("a/set", ("train",), train="train", subset="part", revision=NEW)


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
        return {"dev": object()}, None

    monkeypatch.setattr(sources, "_load_from_hub", load_nothing)
    hub = HubSource("ours", "part", "abc", None, "dev", "dev")
    task = replace(find_task("boolq"), hub=hub)
    found = sources.open_splits(SourceConfig(kind="hub", **config), task)
    assert asked == [expected]
    assert list(found) == ["validation", "test"]
