"""Tensors of a checkpoint folder, whole or by rows, however they are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

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
    """In one file or two with an index, as safetensors or as PyTorch's."""
    folder.mkdir(exist_ok=True)
    suffix, sharded = layout.split()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    parts = halves(tensors) if sharded == "sharded" else [tensors]
    names = [f"{stem}-{i}.{suffix}" if len(parts) > 1 else f"{stem}.{suffix}" for i in range(2)]
    for name, part in zip(names, parts, strict=False):
        if suffix == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if len(parts) > 1:
        weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
        index = folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


LAYOUTS = ["safetensors one", "safetensors sharded", "bin one", "bin sharded"]


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


def test_more_bytes_than_are_mapped_at_a_time_are_read_right(tmp_path: Path) -> None:
    tensors = {f"{i}.weight": torch.full((6, 1 << 20), float(i)) for i in range(4)}
    reader = CheckpointReader(write(tmp_path, tensors, "safetensors sharded"))
    for _ in range(2):
        for name, tensor in tensors.items():
            assert torch.equal(reader.rows(name, 2, 6), tensor[2:6])


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
