import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softprompt_dist.adaptation import sharded_files
from softprompt_dist.adaptation.sharded_files import (
    WeightFormat,
    num_bytes_of,
    read_into,
    write_tensors,
)
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.safetensors_file import SafetensorsStream
from softprompt_dist.durable import digest_of_file
from softprompt_dist.errors import BackboneError, CheckpointError, MachineError
from tests.damage import full_at_call


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sharded_files, "CHUNK_BYTES", 44)


def whole(tensor):
    return ShardedTensor(tuple(tensor.shape), (Piece(0, tensor.view(-1)),))


def some_tensors():
    torch.manual_seed(0)
    return {
        "b.matrix": torch.randn(9, 5),
        "a.cube": torch.randn(3, 2, 4),
        "vector": torch.randn(23),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
    }


def as_sharded(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


def test_one_file_holds_every_tensor_and_its_digest_is_right(tmp_path):
    tensors = some_tensors()
    digests = write_tensors(tmp_path, as_sharded(tensors))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor)
    assert digests == {"model.safetensors": digest_of_file(tmp_path / "model.safetensors")}
    assert num_bytes_of(as_sharded(tensors)) == 4 * (45 + 24 + 23 + 1)


def test_shards_are_in_the_form_of_hugging_face(tmp_path):
    tensors = some_tensors()
    digests = write_tensors(tmp_path, as_sharded(tensors), WeightFormat(max_shard_bytes=200))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 93}
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    }
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert torch.equal(opened.get_tensor(name), tensors[name])
    assert digests == {path.name: digest_of_file(path) for path in tmp_path.iterdir()}


def test_bf16_is_rounded_as_torch_rounds_and_factors_come_before_that(tmp_path):
    tensors = some_tensors()
    chosen = WeightFormat(torch.bfloat16, factors={"b.matrix": 0.25})
    write_tensors(tmp_path, as_sharded(tensors), chosen)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["b.matrix"], (tensors["b.matrix"] * 0.25).bfloat16())
    assert torch.equal(stored["vector"], tensors["vector"].bfloat16())


def test_no_more_than_a_chunk_is_held(tmp_path, monkeypatch):
    sizes = []
    write = SafetensorsStream.write
    monkeypatch.setattr(
        SafetensorsStream, "write", lambda self, t: (sizes.append(len(t)), write(self, t))
    )
    tensors = some_tensors()
    write_tensors(tmp_path, as_sharded(tensors))
    assert max(sizes) == 11
    assert sum(sizes) == 93


def test_parts_that_do_not_make_a_whole_are_never_written(tmp_path):
    half = ShardedTensor((4,), (Piece(0, torch.ones(2)),))
    with pytest.raises(AssertionError, match="hold 2 elements of half, which has 4"):
        write_tensors(tmp_path, {"half": half})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_shard_bytes", [None, 100])
def test_a_disk_full_in_the_middle_leaves_nothing(tmp_path, monkeypatch, max_shard_bytes):
    monkeypatch.setattr(SafetensorsStream, "write", full_at_call(7, SafetensorsStream.write))
    chosen = WeightFormat(max_shard_bytes=max_shard_bytes)
    with pytest.raises(MachineError, match=r"No space left.* take 372 bytes, [\d,]+ are free"):
        write_tensors(tmp_path, as_sharded(some_tensors()), chosen)
    assert list(tmp_path.iterdir()) == []


def test_a_piece_is_filled_with_its_own_elements_only(tmp_path):
    matrix = torch.arange(45.0).view(9, 5)
    save_file({"m": matrix}, tmp_path / "model.safetensors")
    for first in range(45):
        for last in range(first, 46):
            buffer = torch.full((last - first + 2,), -1.0)
            read_into(tmp_path, {"m": ShardedTensor((9, 5), (Piece(first, buffer[1:-1]),))})
            assert torch.equal(buffer[1:-1], matrix.view(-1)[first:last])
            assert buffer[0] == buffer[-1] == -1


def test_a_row_longer_than_a_chunk_is_read(tmp_path):
    wide = torch.arange(120.0).view(2, 60)
    save_file({"w": wide}, tmp_path / "model.safetensors")
    values = torch.zeros(50)
    read_into(tmp_path, {"w": ShardedTensor((2, 60), (Piece(40, values),))})
    assert torch.equal(values, wide.view(-1)[40:90])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin", "sharded_bin", "old_bin"])
def test_what_checkpoints_there_are_is_read_into_fp32(tmp_path, dtype, kind):
    stored = {name: tensor.to(dtype) for name, tensor in some_tensors().items()}
    first = {name: stored[name] for name in ("b.matrix", "scalar")}
    second = {name: tensor for name, tensor in stored.items() if name not in first}
    if kind == "safetensors":
        save_file(stored, tmp_path / "model.safetensors")
    elif kind in ("bin", "old_bin"):
        path = tmp_path / "pytorch_model.bin"
        torch.save(stored, path, _use_new_zipfile_serialization=kind == "bin")
    else:
        stem, suffix = ("model", "safetensors") if kind == "sharded" else ("pytorch_model", "bin")
        weight_map = {}
        for number, part in enumerate((first, second), start=1):
            name = f"{stem}-{number:05d}-of-00002.{suffix}"
            (save_file if kind == "sharded" else torch.save)(part, tmp_path / name)
            weight_map |= dict.fromkeys(part, name)
        index = tmp_path / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    tensors = {name: torch.full_like(t, 7.0) for name, t in some_tensors().items()}
    read_into(tmp_path, as_sharded(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, stored[name].float())


def test_names_in_the_file_may_be_others(tmp_path):
    save_file({"wte.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    tensor = torch.zeros(2, 3)
    read_into(tmp_path, {"transformer.wte": whole(tensor)}, {"transformer.wte": "wte.weight"})
    assert torch.equal(tensor, torch.ones(2, 3))


def test_a_parameter_that_trains_can_be_read_into(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(3))
    read_into(tmp_path, {"w": whole(parameter)})
    assert parameter.tolist() == [1, 1, 1]
    (tmp_path / "copy").mkdir()
    write_tensors(tmp_path / "copy", {"w": whole(parameter)})
    assert load_file(tmp_path / "copy" / "model.safetensors")["w"].tolist() == [1, 1, 1]


def test_what_does_not_fit_is_named(tmp_path):
    save_file({"w": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"lacks 2 tensors of the model: \['a', 'b'\]"):
        read_into(
            tmp_path, as_sharded({"w": torch.ones(2, 3), "b": torch.ones(1), "a": torch.ones(1)})
        )
    with pytest.raises(CheckpointError, match=r"w is \(2, 3\), not \(3, 2\)"):
        read_into(tmp_path, {"w": whole(torch.ones(3, 2))}, error=CheckpointError)


def test_codes_are_not_taken_for_numbers(tmp_path):
    save_file({"w": torch.ones(2, 3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"quantized.*\['w'\]"):
        read_into(tmp_path, {"w": whole(torch.ones(2, 3))})
    both = {"x.weight": torch.ones(2, 3, dtype=torch.int8), "x.weight_scale": torch.ones(2, 1)}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"quantized.*\['x.weight'\]"):
        read_into(tmp_path, {"x.weight": whole(torch.ones(2, 3))})


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_cut_short_is_an_error(tmp_path, name):
    tensors = {"w": torch.ones(200, 3)}
    (save_file if name.startswith("model") else torch.save)(tensors, tmp_path / name)
    os.truncate(tmp_path / name, 900)
    with pytest.raises(BackboneError, match="damaged or incomplete"):
        read_into(tmp_path, as_sharded(tensors))


def test_code_in_a_bin_is_never_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/planted",)

    torch.save({"w": Planted()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="code in it is never run"):
        read_into(tmp_path, {"w": whole(torch.ones(3))})
    assert not (tmp_path / "planted").exists()
