"""The layouts in which SuperGLUE is handed out: all give the same task."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.data.tasks import TaskData, load_task
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig, TaskConfig

SPLITS = ("train", "validation")


def boolq_rows(count: int, *, labelled: bool = True) -> bytes:
    rows: list[dict[str, Any]] = [
        {"question": f"is it {n}", "passage": f"It is {n}.", "idx": n} for n in range(count)
    ]
    if labelled:
        rows = [row | {"label": row["idx"] % 2 == 0} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "train.jsonl": boolq_rows(30),
    "val.jsonl": boolq_rows(6),
    "test.jsonl": boolq_rows(4, labelled=False),
}


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def below(folder: str, files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def load(path: Path, splits: tuple[str, ...] = SPLITS, **source: Any) -> TaskData:
    config = SourceConfig(kind="superglue", path=str(path), **source)
    return load_task(TaskConfig(catalogue="boolq", source=config), splits)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    folder = tmp_path / "superglue" / "BoolQ"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder.parent


OTHER = dict.fromkeys(["__MACOSX/BoolQ/._val.jsonl", "CB/val.jsonl", "OldBoolQ/val.jsonl"], b"\xff")


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("combined.zip", OTHER | below("BoolQ")),
        ("combined.zip", OTHER | below("combined/BoolQ")),
        ("combined.zip", {n.replace("/", "\\"): c for n, c in below("SuperGLUE/BoolQ").items()}),
        ("combined.zip", {"CB.zip": b"not opened", "BoolQ.zip": zip_of(below("BoolQ"))}),
        ("combined.zip", {"combined/BoolQ.zip": zip_of(FILES)}),
        ("BoolQ.zip", below("BoolQ")),
        ("BoolQ.zip", FILES),
    ],
)
def test_every_zip_gives_what_the_folder_gives(
    tmp_path: Path, unpacked: Path, name: str, members: dict[str, bytes]
) -> None:
    expected = load(unpacked)
    # A test file is there, if without labels: no row of train is taken for it.
    assert (len(expected.train), len(expected.validation)) == (30, 6)
    path = tmp_path / name
    path.write_bytes(zip_of(members))
    before = sorted(tmp_path.rglob("*"))
    assert load(path).splits == expected.splits
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked to the disk"
    (tmp_path / "zips").mkdir()
    path.rename(tmp_path / "zips" / name)
    assert load(tmp_path / "zips").splits == expected.splits


def test_a_folder_may_be_the_tasks_own_and_packed(tmp_path: Path, unpacked: Path) -> None:
    assert load(unpacked / "BoolQ").splits == load(unpacked).splits
    (unpacked / "BoolQ" / "val.jsonl").unlink()
    packed = unpacked / "BoolQ" / "validation.jsonl.gz"
    packed.write_bytes(gzip.compress(FILES["val.jsonl"]))
    data = load(unpacked)
    assert len(data.validation) == 6
    record = data.records["validation"]
    assert record.origin == "BoolQ/validation.jsonl.gz"
    assert record.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_the_official_test_set_has_no_labels(unpacked: Path) -> None:
    with pytest.raises(DataError, match=r"'test' has no labels: none of the 4 rows of BoolQ/test"):
        load(unpacked, ("test",))


def test_a_file_named_for_one_split_is_not_taken_for_another(unpacked: Path) -> None:
    data = load(unpacked, ("train", "validation", "test"), test="val")
    assert len(data.test) == 6
    assert len(data.train) + len(data.validation) == 30
    with pytest.raises(DataError, match=r"'vall'.*Did you mean 'val\.jsonl'"):
        load(unpacked, test="vall")


def test_a_checksum_of_a_member(unpacked: Path) -> None:
    digest = hashlib.sha256(FILES["val.jsonl"]).hexdigest()
    assert load(unpacked, sha256={"validation": digest}).records["validation"].sha256 == digest
    with pytest.raises(DataError, match=f"has sha256 {digest}, but"):
        load(unpacked, sha256={"validation": "0" * 64})


def test_what_cannot_be_used_is_a_message(tmp_path: Path, unpacked: Path) -> None:
    with pytest.raises(DataError, match="there is no zip and no folder BoolQ"):
        load(tmp_path / "nowhere")
    broken = tmp_path / "combined.zip"
    broken.write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"Cannot read .*combined\.zip"):
        load(broken)
    broken.write_bytes(zip_of({"CB/val.jsonl": b"{}"}))
    with pytest.raises(DataError, match="has no jsonl files of BoolQ"):
        load(broken)
    with pytest.raises(DataError, match=r"task\.source\.path is not given"):
        load_task(TaskConfig(catalogue="boolq", source=SourceConfig(kind="superglue")))
    for settings in ({"catalogue": "sst2"}, {}):
        with pytest.raises(DataError, match="is no task of SuperGLUE"):
            load_task(TaskConfig(source=SourceConfig(kind="superglue", path="x"), **settings))


def test_a_member_that_is_damaged_is_a_message(tmp_path: Path) -> None:
    packed = bytearray(zip_of(below("BoolQ")))
    at = packed.index(b"BoolQ/val.jsonl") + 40
    packed[at : at + 8] = bytes(8)
    (tmp_path / "BoolQ.zip").write_bytes(packed)
    with pytest.raises(DataError, match=r"Cannot read BoolQ\.zip:BoolQ/val\.jsonl"):
        load(tmp_path / "BoolQ.zip", ("validation",))
