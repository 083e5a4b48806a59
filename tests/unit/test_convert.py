"""A copy of a backbone is its source in another precision, or it is not there at all."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from softprompt_dist import convert
from softprompt_dist.backbone import conversion
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.formats import Int8Rows
from softprompt_dist.backbone.load import load_backbone, load_tokenizer
from softprompt_dist.backbone.safetensors_file import SafetensorsWriter
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError, ConfigError, MachineError
from tests.models import make_llama, make_t5
from tests.runs import PARTITION_EVERYTHING
from tests.unit.test_identity import identity_of

WO = "decoder.block.1.layer.2.DenseReluDense.wo.weight"


def copy_of(source: Path, output: Path, precision: str, *options: str) -> Path:
    arguments = ["--backbone", str(source), "--output", str(output), "--precision", precision]
    convert.main([*arguments, *options])
    return output


def load(folder: Path, **settings: Any) -> Backbone:
    settings = {"sharding": "replicated", "dtype": "bf16"} | settings
    ds_config = PARTITION_EVERYTHING if settings["sharding"] == "zero3" else None
    return load_backbone(BackboneConfig(path=str(folder), **settings), ds_config)


def assert_same_weights(one: Backbone, other: Backbone) -> None:
    held, expected = dict(one.held_tensors()), dict(other.held_tensors())
    assert held.keys() == expected.keys()
    assert [n for n in held if not torch.equal(held[n], expected[n])] == []
    ids = torch.arange(one.vocabulary_size)
    assert torch.equal(one.embedding(ids), other.embedding(ids))
    assert one.identity.digest == other.identity.digest


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def values_of(folder: Path, name: str) -> torch.Tensor:
    tensors = stored(folder)
    return tensors[name].float() * tensors[f"{name}_scale"]


def as_pytorch_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize(
    "cell",
    [
        ("bf16", [], {}),
        ("bf16", ["--max-shard-size", "40KB"], {"sharding": "zero3"}),
        ("int8", [], {"quantization": "int8"}),
        ("int8", ["--rest", "fp32"], {"quantization": "int8", "dtype": "fp32"}),
        ("int8", [], {"quantization": "int8", "sharding": "zero3"}),
        (
            "int8",
            ["--quantized-layers", "blocks_without_wo"],
            {"quantization": "int8", "quantized_layers": "blocks_without_wo"},
        ),
    ],
    ids=["bf16", "bf16 zero3", "int8", "int8 fp32", "int8 zero3", "int8 without wo"],
)
def test_a_copy_loads_as_its_source_in_that_precision(
    kind: str,
    cell: tuple[str, list[str], dict[str, str]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    precision, options, settings = cell
    source: Path = request.getfixturevalue(kind)
    if settings.get("sharding") == "zero3":
        request.getfixturevalue("world_of_one")
    copy = copy_of(source, tmp_path / "copy", precision, *options)
    copied, original = load(copy, **settings), load(source, **settings)
    assert_same_weights(copied, original)
    # With which prompts begin: neither storage nor sharding shows in them.
    ids, whole = torch.arange(copied.vocabulary_size), {**settings, "sharding": "replicated"}
    expected = load(source, **whole).embed(ids)
    assert torch.equal(copied.embed(ids), expected)
    assert torch.equal(original.embed(ids), expected)
    assert len(load_tokenizer(copy)) == len(load_tokenizer(source))
    assert "int8" not in caplog.text


@pytest.fixture
def world_of_one(lone_process: None) -> None:
    from softprompt_dist.parallel.join import join_world

    join_world()


def test_a_copy_has_the_names_of_the_model_and_only_the_layers_are_int8(
    tiny_t5: Path, tmp_path: Path
) -> None:
    source = load_file(tiny_t5 / "model.safetensors")
    halved = stored(copy_of(tiny_t5, tmp_path / "bf16", "bf16"))
    assert halved.keys() == source.keys()
    assert all(torch.equal(t, source[n].to(torch.bfloat16)) for n, t in halved.items())
    mixed = stored(copy_of(tiny_t5, tmp_path / "int8", "int8", "--rest", "fp32"))
    int8 = {name for name, tensor in mixed.items() if tensor.dtype == torch.int8}
    assert {f"{name}_scale" for name in int8} == mixed.keys() - source.keys()
    assert all(torch.equal(mixed[name], source[name]) for name in source.keys() - int8)
    biases = {n for n in source if "relative_attention_bias" in n}
    assert int8 == {n for n in source if ".block." in n and source[n].dim() == 2} - biases
    assert (len(int8), len(biases)) == (36, 2)
    quantized, scale = Int8Rows.split(Int8Rows().encode(source[WO]))
    assert torch.equal(mixed[WO], quantized)
    assert torch.equal(mixed[f"{WO}_scale"], scale[:, None])


@pytest.mark.parametrize("settings", [{}, {"dtype": "fp32"}])
def test_an_int8_copy_can_be_held_in_more_bits_with_a_warning(
    settings: dict[str, str], tiny_t5: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copy_of(tiny_t5, tmp_path / "copy", "int8")
    backbone = load(copy, **settings)
    slot = next(s for b in backbone.blocks() for s in b.slots if s.name == WO)
    held = slot.bytes_RN.view(backbone.dtype)
    assert torch.equal(held, values_of(copy, WO).to(backbone.dtype))
    assert "36 matrices as int8" in caplog.text


def test_wo_of_an_int8_copy_stays_int8_in_value_and_a_warning_says_so(
    tiny_t5: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copy_of(tiny_t5, tmp_path / "copy", "int8")
    load(copy, quantization="int8", quantized_layers="blocks_without_wo")
    assert "stores 4 matrices as int8" in caplog.text
    assert ".wo.weight" in caplog.text


def test_the_copy_is_cut_into_files_no_greater_than_asked(tiny_t5: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_t5, tmp_path / "copy", "bf16", "--max-shard-size", "20KB")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in copy.glob("*.safetensors")}
    assert len(files) > 3
    assert index["weight_map"] == {name: file for file, ts in files.items() for name in ts}
    sizes = {file: [t.nbytes for t in tensors.values()] for file, tensors in files.items()}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert all(sum(size) <= 20_000 or len(size) == 1 for size in sizes.values())
    AutoModelForSeq2SeqLM.from_pretrained(str(copy))


def test_a_sharded_source_and_a_pytorch_source_give_the_same_copy(tmp_path: Path) -> None:
    model = make_t5(256)
    for name, size in (("whole", "1GB"), ("sharded", "40KB"), ("pickled", "1GB")):
        model.save_pretrained(str(tmp_path / name), max_shard_size=size)
    as_pytorch_file(tmp_path / "pickled")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    copies = [
        copy_of(tmp_path / name, tmp_path / f"{name}-copy", "int8") / "model.safetensors"
        for name in ("whole", "sharded", "pickled")
    ]
    assert len({path.read_bytes() for path in copies}) == 1
    assert not list((tmp_path / "pickled-copy").glob("*.bin"))


def test_a_tied_head_is_stored_once_even_if_the_source_has_it_twice(tmp_path: Path) -> None:
    make_llama().save_pretrained(str(tmp_path / "llama"))
    file = tmp_path / "llama" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    copy = copy_of(tmp_path / "llama", tmp_path / "copy", "bf16")
    assert stored(copy).keys() == weights.keys() - {"lm_head.weight"}
    assert_same_weights(load(copy), load(tmp_path / "llama"))
    weights["lm_head.weight"][3] += 1
    save_file(weights, file, metadata={"format": "pt"})
    other = copy_of(tmp_path / "llama", tmp_path / "other", "bf16")
    assert "lm_head.weight" in stored(other)
    assert_same_weights(load(other), load(tmp_path / "llama"))


def test_a_tied_t5_and_one_with_its_own_head_both_keep_what_they_have(
    tiny_t5: Path, tmp_path: Path
) -> None:
    settings = T5Config.from_pretrained(str(tiny_t5)).to_dict() | {"tie_word_embeddings": True}
    tied = T5ForConditionalGeneration(T5Config(**settings | {"scale_decoder_outputs": True}))
    tied.save_pretrained(str(tmp_path / "tied"))
    copy = copy_of(tmp_path / "tied", tmp_path / "tied-copy", "int8")
    assert "lm_head.weight" not in stored(copy)
    assert_same_weights(
        load(copy, quantization="int8"), load(tmp_path / "tied", quantization="int8")
    )
    own = stored(copy_of(tiny_t5, tmp_path / "own-copy", "int8"))
    assert not torch.equal(own["lm_head.weight"], own["shared.weight"])


def test_a_copy_of_a_copy_still_has_the_identity_of_the_first(
    tiny_t5: Path, tmp_path: Path
) -> None:
    halved = copy_of(tiny_t5, tmp_path / "bf16", "bf16")
    quantized = copy_of(halved, tmp_path / "int8", "int8")
    again = copy_of(quantized, tmp_path / "again", "int8", "--max-shard-size", "20KB")
    assert identity_of(again).differences(identity_of(tiny_t5)) == []
    assert identity_of(again).digest == identity_of(tiny_t5).digest
    assert_same_weights(load(again, quantization="int8"), load(quantized, quantization="int8"))


@pytest.mark.parametrize("options", [["bf16"], ["int8", "--quantized-layers", "blocks_without_wo"]])
def test_what_int8_rounded_away_is_not_written_in_more_bits(
    options: list[str], tiny_t5: Path, tmp_path: Path
) -> None:
    quantized = copy_of(tiny_t5, tmp_path / "int8", "int8")
    with pytest.raises(BackboneError, match="Convert from the original checkpoint"):
        copy_of(quantized, tmp_path / "copy", *options)
    assert not (tmp_path / "copy").exists()


def test_the_config_says_what_is_stored_and_transformers_refuses_int8(
    tiny_t5: Path, tmp_path: Path
) -> None:
    halved = copy_of(tiny_t5, tmp_path / "bf16", "bf16")
    before, after = (json.loads((f / "config.json").read_text()) for f in (tiny_t5, halved))
    assert after == before | {"dtype": "bfloat16"}
    assert (halved / "generation_config.json").is_file()
    model = AutoModelForSeq2SeqLM.from_pretrained(str(halved))
    assert model.dtype == torch.bfloat16
    quantized = copy_of(tiny_t5, tmp_path / "int8", "int8")
    with pytest.raises(ValueError, match="quantization config"):
        AutoModelForSeq2SeqLM.from_pretrained(str(quantized))


def test_an_output_that_is_there_is_left_as_it_is(tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    output.mkdir()
    copy_of(tiny_t5, output, "bf16")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ConfigError, match="nothing is ever overwritten"):
        copy_of(tiny_t5, output, "int8")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        copy_of(tiny_t5, tmp_path / "file", "int8")


def test_a_full_disk_is_told_before_anything_is_written(
    tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    with pytest.raises(MachineError, match=r"takes 0\.\d\d GB, and .* has 0\.00 GB free. Free"):
        copy_of(tiny_t5, tmp_path / "below" / "copy", "bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing_write", [1, 20])
def test_a_disk_that_fills_meanwhile_leaves_nothing(
    failing_write: int, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 0
    write_rows = SafetensorsWriter.write_rows

    def fail_once(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == failing_write:
            raise OSError(28, "No space left on device")
        write_rows(*arguments)

    monkeypatch.setattr(SafetensorsWriter, "write_rows", fail_once)
    with pytest.raises(MachineError, match="No space left on device. Nothing is left there"):
        copy_of(tiny_t5, tmp_path / "copy", "int8", "--max-shard-size", "20KB")
    assert writes == failing_write
    assert list(tmp_path.iterdir()) == []


def test_a_bit_that_the_disk_turned_is_noticed(
    tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows = SafetensorsWriter.write_rows

    def turn_a_bit(self: SafetensorsWriter, name: str, first: int, bytes_RN: torch.Tensor) -> None:
        if name == f"{WO}_scale":
            bytes_RN = bytes_RN.clone()
            bytes_RN[0, 0] ^= 1
        write_rows(self, name, first, bytes_RN)

    monkeypatch.setattr(SafetensorsWriter, "write_rows", turn_a_bit)
    with pytest.raises(BackboneError, match=rf"^1 tensors .*{re.escape(WO)}"):
        copy_of(tiny_t5, tmp_path / "copy", "int8")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from softprompt_dist import convert
from softprompt_dist.backbone import conversion
place, arguments = sys.argv[1], sys.argv[2:]
before = getattr(conversion, place)
def die(*values):
    before(*values)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(conversion, place, die)
convert.main(arguments)
"""


@pytest.mark.parametrize("place", ["_write_weights", "_compare"])
def test_a_killed_conversion_leaves_no_checkpoint_and_the_next_one_clears_up(
    place: str, tiny_t5: Path, tmp_path: Path
) -> None:
    assert callable(getattr(conversion, place))
    output = tmp_path / "copy"
    arguments = ["--backbone", str(tiny_t5), "--output", str(output), "--precision", "bf16"]
    command = [sys.executable, "-c", KILLED, place, *arguments]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-copy-")
    with pytest.raises(BackboneError, match=r"no config\.json"):
        load(left)
    copy_of(tiny_t5, output, "bf16")
    assert list(tmp_path.iterdir()) == [output]


def test_a_conversion_at_work_is_not_cleared_up_by_another(
    tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights = conversion._write_weights

    def meanwhile_another(*values: Any) -> None:
        monkeypatch.setattr(conversion, "_write_weights", write_weights)
        copy_of(tiny_t5, tmp_path / "copy", "int8")
        write_weights(*values)

    monkeypatch.setattr(conversion, "_write_weights", meanwhile_another)
    with pytest.raises(MachineError, match="not empty"):
        copy_of(tiny_t5, tmp_path / "copy", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert_same_weights(
        load(tmp_path / "copy", quantization="int8"), load(tiny_t5, quantization="int8")
    )


def test_a_damaged_source_gives_no_copy(tiny_t5: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_t5, tmp_path / "t5"))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BackboneError, match="damaged or incomplete"):
        copy_of(source, tmp_path / "copy", "bf16")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "bf16", "--rest", "fp32"], "--rest and --quantized-layers are for int8"),
        (["--precision", "int4"], "invalid choice: 'int4'"),
        (["--precision", "int8", "--max-shard-size", "5 apples"], "'5 apples' is no size"),
        (["--precision", "int8", "--max-shard-size", "0GB"], "'0GB' is no size"),
        ([], "--precision"),
    ],
)
def test_a_wrong_option_is_explained(
    options: list[str], message: str, tiny_t5: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert.main(["--backbone", str(tiny_t5), "--output", str(tmp_path / "copy"), *options])


def test_several_ranks_are_refused(
    tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="on 2 ranks"):
        copy_of(tiny_t5, tmp_path / "copy", "bf16")


def test_a_folder_below_a_file_cannot_be_written(tiny_t5: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MachineError, match=r"Cannot write .*file/copy"):
        copy_of(tiny_t5, tmp_path / "file" / "copy", "bf16")


def test_it_says_what_it_does_and_how_to_use_the_copy(
    tiny_t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of(tiny_t5, tmp_path / "copy", "int8")
    said = capsys.readouterr().out
    assert "found equal: 52 tensors" in said
    assert f"--set backbone.path={tmp_path / 'copy'} --set backbone.dtype=bf16 --set " in said
