"""Tensors of a checkpoint folder, whole or by rows, however they are stored."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.memory import PeakMemory
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.formats import Int8Rows
from softprompt_dist.errors import BackboneError

Tensors = dict[str, Tensor]


@pytest.fixture
def stored() -> Tensors:
    """One of every rank and floating type."""
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(9, 5),
        "b.weight": torch.randn(4, 7).bfloat16(),
        "c.weight": torch.randn(3, 2, 2).half(),
        "norm.weight": torch.randn(6),
        "scalar": torch.tensor(2.5),
    }


def halves(tensors: Tensors) -> list[Tensors]:
    names = list(tensors)
    return [{n: tensors[n] for n in part} for part in (names[::2], names[1::2])]


def write(folder: Path, tensors: Tensors, layout: str) -> Path:
    """In one file or two with an index, as safetensors or as PyTorch's, of before 1.6 or since."""
    folder.mkdir(exist_ok=True)
    suffix, sharded, *old = layout.split()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    parts = halves(tensors) if sharded == "sharded" else [tensors]
    names = [f"{stem}-{i}.{suffix}" if len(parts) > 1 else f"{stem}.{suffix}" for i in range(2)]
    for name, part in zip(names, parts, strict=False):
        if suffix == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=not old)
    if len(parts) > 1:
        weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
        index = folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


PICKLED = ["bin one", "bin sharded", "bin one old", "bin sharded old"]
LAYOUTS = ["safetensors one", "safetensors sharded", *PICKLED]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_comes_back_whole_and_by_rows(
    layout: str, stored: Tensors, tmp_path: Path
) -> None:
    reader = CheckpointReader(write(tmp_path, stored, layout))
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name, tensor in stored.items():
        assert reader.dtype(name) == tensor.dtype
        assert not reader.is_quantized(name)
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.tensor(name).shape == tensor.shape
        rows_RC = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        for first in range(len(rows_RC)):
            for last in range(first + 1, len(rows_RC) + 1):
                assert torch.equal(reader.rows(name, first, last), rows_RC[first:last])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_stays_readable_when_the_files_are_closed(
    layout: str, stored: Tensors, tmp_path: Path
) -> None:
    reader = CheckpointReader(write(tmp_path, stored, layout))
    table = reader.mapped_table("a.weight")
    reader.close()
    assert torch.equal(table, stored["a.weight"])
    assert torch.equal(reader.rows("b.weight", 1, 3), stored["b.weight"][1:3]), "opened again"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_comes_back_as_bytes_to_the_bit_and_as_numbers(
    layout: str, stored: Tensors, tmp_path: Path
) -> None:
    """Whether it is quantized here or was stored so."""
    values_RC = stored["a.weight"]
    bytes_RN = Int8Rows().encode(values_RC)
    quantized_RC, scale_R = Int8Rows.split(bytes_RN)
    held = {"a.weight": quantized_RC.contiguous(), "a.weight_scale": scale_R}
    converted = CheckpointReader(write(tmp_path / "int8", {**stored, **held}, layout))
    source = CheckpointReader(write(tmp_path / "fp32", stored, layout))
    assert converted.shapes == source.shapes
    assert converted.is_quantized("a.weight")
    assert not converted.is_quantized("b.weight")
    for first, last in ((0, 9), (2, 5), (8, 9)):
        for reader in (converted, source):
            assert torch.equal(reader.encoded_int8("a.weight", first, last), bytes_RN[first:last])
        expected = quantized_RC[first:last].float() * scale_R[first:last, None]
        assert torch.equal(converted.rows("a.weight", first, last), expected)


@pytest.mark.parametrize("layout", ["safetensors sharded", "bin one", "bin one old"])
def test_more_bytes_than_are_mapped_at_a_time_are_read_right(layout: str, tmp_path: Path) -> None:
    tensors = {f"{i}.weight": torch.full((6, 1 << 20), float(i)) for i in range(4)}
    folder = write(tmp_path, tensors, layout)
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        reader = CheckpointReader(folder)
        for _ in range(2):
            for name, tensor in tensors.items():
                assert torch.equal(reader.rows(name, 2, 6), tensor[2:6])
    assert load.call_count == layout.startswith("bin"), "unpickled more than once"


@pytest.mark.parametrize("layout", ["bin one", "bin one old"])
def test_a_pickled_file_is_read_through_a_map(layout: str, tmp_path: Path) -> None:
    """Of 160 MB no more than 112 MB are in memory at any time."""
    write(tmp_path, {f"{i}.weight": torch.ones(64, 1 << 16) for i in range(10)}, layout)
    with PeakMemory() as peak:
        reader = CheckpointReader(tmp_path)
        for name in reader.shapes:
            for row in range(64):
                assert reader.rows(name, row, row + 1).sum() == 1 << 16
    assert peak.resident_bytes - peak.resident_before < 112 * 2**20


def test_a_table_at_an_odd_byte_of_an_old_file_is_right_and_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = torch.randn(9, 5)
    for length in range(1, 9):  # of the name, which stands before the numbers
        name = "n" * length
        write(tmp_path, {name: table}, "bin one old")
        assert torch.equal(CheckpointReader(tmp_path).mapped_table(name), table)
    told = [record.getMessage() for record in caplog.records]
    assert 0 < len(told) < 8
    assert "begins at an odd byte" in told[0]
    assert "`softprompt convert` makes a copy" in told[0]


@pytest.mark.parametrize("stored_as", ["safetensors", "bin"])
def test_one_file_is_read_before_the_shards_that_an_index_names(
    stored_as: str, stored: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does, which leaves the index behind when it saves a model as one file."""
    shards = write(tmp_path, {n: t * 0 for n, t in stored.items()}, f"{stored_as} sharded")
    write(tmp_path, stored, f"{stored_as} one")
    stem = "model" if stored_as == "safetensors" else "pytorch_model"
    for number in (1, 2):
        old = shards / f"{stem}-{number - 1}.{stored_as}"
        old.rename(shards / f"{stem}-0000{number}-of-00002.{stored_as}")
    for _ in range(2):
        reader = CheckpointReader(tmp_path)
        assert torch.equal(reader.tensor("a.weight"), stored["a.weight"])
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"{stem}.{stored_as}, which is read" in warning
    assert f"2 shards such as {stem}-00001-of-00002.{stored_as}" in warning


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_named(text: str, stored: Tensors, tmp_path: Path) -> None:
    write(tmp_path, stored, "safetensors sharded")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(BackboneError, match=r"index\.json.*Fetch the file again"):
        CheckpointReader(tmp_path)


CODES: dict[str, Tensors] = {
    "int8 without a scale": {"a.weight": torch.zeros(9, 5, dtype=torch.int8)},
    "integers": {"a.weight": torch.zeros(9, 5, dtype=torch.int64)},
    "fp8 without a scale": {"a.weight": torch.zeros(9, 5).to(torch.float8_e4m3fn)},
    "fp8 with scales": {
        "a.weight": torch.zeros(9, 5).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(9),
    },
    "one scale for all rows": {
        "a.weight": torch.zeros(9, 5, dtype=torch.int8),
        "a.weight_scale": torch.ones(1),
    },
}


@pytest.mark.parametrize("case", CODES)
def test_the_codes_of_other_quantizations_are_no_numbers(
    case: str, stored: Tensors, tmp_path: Path
) -> None:
    reader = CheckpointReader(write(tmp_path, {**stored, **CODES[case]}, "safetensors one"))
    assert [name for name in reader.shapes if not reader.holds_numbers(name)] == ["a.weight"]


@pytest.mark.parametrize(
    ("packing", "order", "reason"),
    [
        (zipfile.ZIP_DEFLATED, sys.byteorder, "is compressed inside"),
        (zipfile.ZIP_STORED, {"little": "big"}.get(sys.byteorder, "little"), "another byte order"),
    ],
)
def test_a_bin_whose_numbers_do_not_lie_in_it_as_they_are_is_refused(
    packing: int, order: str, reason: str, stored: Tensors, tmp_path: Path
) -> None:
    """Which torch itself reads: no other bytes may be taken for the numbers."""
    torch.save(stored, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", packing) as changed,
    ):
        for name in plain.namelist():
            content = order.encode() if name.endswith("/byteorder") else plain.read(name)
            changed.writestr(name, content)
    with pytest.raises(BackboneError, match=f"{reason}.*as safetensors"):
        CheckpointReader(tmp_path)
