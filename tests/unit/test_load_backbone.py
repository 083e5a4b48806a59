"""A backbone is loaded whole or not at all, and says who it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from softprompt_dist.backbone.arrival import assert_all_arrived
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.filling import fill
from softprompt_dist.backbone.flat_weights import Slot
from softprompt_dist.backbone.load import (
    inventory_of,
    load_backbone,
    load_embedding,
    load_tokenizer,
    locate_backbone,
)
from softprompt_dist.config import BackboneConfig, TuneConfig
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.errors import BackboneError, ConfigError
from softprompt_dist.recipe import load_recipe
from tests.models import make_llama, make_t5

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def t5_folder(tiny_t5: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_t5, tmp_path / "t5"))


def load(folder: Path | str, **settings: Any) -> Backbone:
    return load_backbone(BackboneConfig(path=str(folder), sharding="replicated", **settings))


def slots_of(backbone: Backbone) -> dict[str, Slot]:
    return {slot.name: slot for block in backbone.blocks() for slot in block.slots}


def change_weights(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_whole_t5_is_frozen_and_keeps_its_own_head(tiny_t5: Path) -> None:
    backbone = load(tiny_t5)
    stored = load_file(tiny_t5 / "model.safetensors")
    assert backbone.family == "seq2seq"
    assert (backbone.d_model, backbone.vocabulary_size) == (32, 256)
    assert not any(p.requires_grad for p in backbone.parameters())
    head_VD = slots_of(backbone)["lm_head.weight"].bytes_RN.view(torch.float32)
    assert torch.equal(head_VD, stored["lm_head.weight"])
    assert torch.equal(backbone.embedding.table_VD, stored["shared.weight"])
    assert not torch.equal(stored["lm_head.weight"], stored["shared.weight"])
    assert not backbone.training


def test_a_llama_is_causal(tiny_llama: Path) -> None:
    backbone = load(tiny_llama)
    assert backbone.family == "causal"
    assert (backbone.d_model, backbone.vocabulary_size) == (32, 256)


def test_dropout_comes_from_the_recipe_not_from_the_checkpoint(tiny_t5: Path) -> None:
    assert json.loads((tiny_t5 / "config.json").read_text())["dropout_rate"] == 0.1

    def rates(backbone: Backbone) -> set[float]:
        ids = torch.tensor([[3, 4, 1]])
        batch = TokenBatch(ids, torch.ones_like(ids), ids, torch.ones_like(ids))
        attention, dropout = F.scaled_dot_product_attention, F.dropout
        with (
            mock.patch.object(F, "scaled_dot_product_attention", wraps=attention) as attended,
            mock.patch.object(F, "dropout", wraps=dropout) as dropped,
        ):
            backbone(torch.randn(1, 2, 32), batch)
        assert bool(dropped.called) == backbone.training
        rates = [call.args[1] for call in dropped.call_args_list]
        return {*rates, *(call.kwargs["dropout_p"] for call in attended.call_args_list)}

    assert rates(load(tiny_t5)) == {0.0}
    with_dropout = load(tiny_t5, dropout=0.25)
    assert rates(with_dropout) == {0.25}
    assert with_dropout.training


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "decoder.block.1.layer.2.DenseReluDense.wo.weight"]
)
def test_a_weight_that_the_checkpoint_lacks_is_named(t5_folder: Path, name: str) -> None:
    change_weights(t5_folder, lambda w: {k: v for k, v in w.items() if k != name})
    with pytest.raises(
        BackboneError, match="lacks 1 tensors that its config.json asks for"
    ) as failure:
        load(t5_folder)
    assert name in str(failure.value)
    assert str(t5_folder) in str(failure.value)
    assert "Fetch the checkpoint again" in str(failure.value)


def assert_arrival_notices(folder: Path, name: str, change: Callable[[Backbone], None]) -> None:
    """Arrival is proven before the change; after it the error names this tensor and no other."""
    config = BackboneConfig(path=str(folder), sharding="replicated")
    inventory = inventory_of(folder, config)
    backbone = fill(inventory, config, None, None)
    assert_all_arrived(backbone, inventory)
    change(backbone)
    with pytest.raises(BackboneError, match="did not load whole") as failure:
        assert_all_arrived(backbone, inventory)
    assert "0 tensors are not held" in str(failure.value)
    assert f"(['{name}'])" in str(failure.value)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.1.layer.2.DenseReluDense.wo.weight",
    ],
)
def test_a_matrix_that_lost_a_bit_is_named(tiny_t5: Path, name: str) -> None:
    def lose(backbone: Backbone) -> None:
        slots_of(backbone)[name].bytes_RN[3, 4].bitwise_xor_(1)

    assert_arrival_notices(tiny_t5, name, lose)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.final_layer_norm.weight",
        "encoder.block.1.layer.0.layer_norm.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ],
)
def test_a_small_tensor_that_lost_a_value_is_named(tiny_t5: Path, name: str) -> None:
    def lose(backbone: Backbone) -> None:
        backbone.tensors()[f"model.{name}"].view(-1)[5] += 1e-3

    assert_arrival_notices(tiny_t5, name, lose)


def test_a_head_that_was_tied_behind_our_back_is_named(tiny_t5: Path) -> None:
    def tie(backbone: Backbone) -> None:
        head = slots_of(backbone)["lm_head.weight"]
        head.bytes_RN.view(torch.float32).copy_(backbone.embedding.table_VD)

    assert_arrival_notices(tiny_t5, "lm_head.weight", tie)


def test_a_llama_whose_own_head_is_missing_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(str(tmp_path))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(BackboneError, match=r"lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_truncated_safetensors_file_is_refused(t5_folder: Path, keep: int) -> None:
    file = t5_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BackboneError, match=str(t5_folder)):
        load(t5_folder)


def test_sharded_safetensors_load_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_t5(256).save_pretrained(str(tmp_path), max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load(tmp_path).identity.digest == load_whole_twin(tmp_path).identity.digest
    shards[1].unlink()
    with pytest.raises(BackboneError, match=shards[1].name):
        load(tmp_path)


def load_whole_twin(folder: Path) -> Backbone:
    twin = folder.with_name("twin")
    make_t5(256).save_pretrained(str(twin))
    return load(twin)


def as_pytorch_file(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_a_pytorch_checkpoint_loads_and_is_checked_too(t5_folder: Path, tiny_t5: Path) -> None:
    file = as_pytorch_file(t5_folder)
    assert load(t5_folder).identity.digest == load(tiny_t5).identity.digest
    weights = torch.load(file)
    del weights["lm_head.weight"]
    torch.save(weights, file)
    with pytest.raises(BackboneError, match=r"lm_head\.weight"):
        load(t5_folder)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 and no more"])
def test_a_damaged_pytorch_checkpoint_is_refused(t5_folder: Path, content: bytes) -> None:
    as_pytorch_file(t5_folder).write_bytes(content)
    with pytest.raises(BackboneError, match=str(t5_folder)):
        load(t5_folder)


def test_code_in_a_pytorch_checkpoint_is_never_run(t5_folder: Path, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": Trap(tmp_path / "sprung")}, as_pytorch_file(t5_folder))
    with pytest.raises(BackboneError, match=str(t5_folder)):
        load(t5_folder)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_nan_in_a_row_that_is_looked_up_is_named(t5_folder: Path, sharding: str) -> None:
    def break_a_row(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["shared.weight"][200, 0] = torch.nan
        return weights

    change_weights(t5_folder, break_a_row)
    read = {"replicated": load_backbone, "zero3": load_embedding}[sharding]
    with pytest.raises(BackboneError, match=r"NaN.*row 200 of shared\.weight"):
        read(BackboneConfig(path=str(t5_folder), sharding=sharding))


@pytest.mark.parametrize("path", ["/no/such/folder", "./neither", "a/b/c"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(BackboneError, match=f"'{path}' does not exist"):
        load(path)


def test_a_folder_has_no_revision(tiny_t5: Path) -> None:
    with pytest.raises(BackboneError, match="revision is 'v2', but .* has no revisions"):
        locate_backbone(BackboneConfig(path=str(tiny_t5), revision="v2"))


def test_a_folder_without_config_or_weights_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BackboneError, match=r"config\.json"):
        load(empty)
    (t5_folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=str(t5_folder)):
        load(t5_folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", "{}", '{"model_type": "no-such-type"}'])
def test_a_config_that_is_none_is_refused(t5_folder: Path, text: str) -> None:
    (t5_folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=str(t5_folder)):
        load(t5_folder)


@pytest.mark.parametrize(
    "name", ["shared.weight", "lm_head.weight", "encoder.block.0.layer.0.layer_norm.weight"]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_codes_in_place_of_numbers_are_refused(
    t5_folder: Path, name: str, dtype: torch.dtype
) -> None:
    change_weights(t5_folder, lambda w: {**w, name: w[name].to(dtype)})
    with pytest.raises(
        BackboneError, match="stores 1 tensors neither as floating-point"
    ) as failure:
        load(t5_folder)
    assert f"{name} ({dtype})" in str(failure.value)
    assert str(t5_folder) in str(failure.value)
    assert "Set backbone.path to the original checkpoint" in str(failure.value)


def test_an_int8_table_is_refused(t5_folder: Path) -> None:
    table, scales = torch.zeros(256, 32, dtype=torch.int8), torch.ones(256)
    held = {"shared.weight": table, "shared.weight_scale": scales}
    change_weights(t5_folder, lambda w: {**w, **held})
    with pytest.raises(BackboneError, match=r"shared\.weight \(torch\.int8\)"):
        load(t5_folder)


def test_a_config_of_other_shapes_is_refused(t5_folder: Path) -> None:
    change_config(t5_folder, d_ff=48)
    with pytest.raises(BackboneError, match=str(t5_folder)):
        load(t5_folder)


@pytest.mark.parametrize(
    "value",
    [
        {"d_model": "32"},
        {"d_ff": -1},
        {"num_heads": None},
        {"vocab_size": 0},
        {"layer_norm_epsilon": [1]},
        {"dtype": "no-such-type"},
        {"dense_act_fn": ["gelu"]},
    ],
)
def test_a_config_with_a_value_of_no_sense_is_refused(
    t5_folder: Path, value: dict[str, Any]
) -> None:
    change_config(t5_folder, **value)
    with pytest.raises(BackboneError, match=rf"(?s){t5_folder}.*Use the config\.json that belongs"):
        load(t5_folder)


def test_weights_under_a_name_of_their_own_are_refused(t5_folder: Path) -> None:
    change_config(t5_folder, transformers_weights="other.safetensors")
    with pytest.raises(BackboneError, match=r"'other\.safetensors'.*Give the file that name"):
        load(t5_folder)


def test_code_beside_a_tokenizer_is_never_run(t5_folder: Path, tmp_path: Path) -> None:
    asking = {"auto_map": {"AutoTokenizer": ["tokenizing.Own", None]}, "tokenizer_class": "Own"}
    (t5_folder / "tokenizer_config.json").write_text(json.dumps(asking))
    (t5_folder / "tokenizing.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    load_tokenizer(t5_folder)
    assert not (tmp_path / "sprung").exists()


def test_code_beside_the_weights_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    change_config(t5_folder, auto_map={"AutoModelForSeq2SeqLM": "modeling.Model"})
    (t5_folder / "modeling.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(BackboneError, match="auto_map"):
        load(t5_folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("make", [make_t5, make_llama])
def test_a_folder_without_tokenizer_is_refused(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(str(tmp_path))
    with pytest.raises(BackboneError, match="No tokenizer in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Unigram"}}'])
def test_a_damaged_tokenizer_is_refused(t5_folder: Path, content: str) -> None:
    assert len(load_tokenizer(t5_folder)) > 30
    (t5_folder / "tokenizer.json").write_text(content)
    with pytest.raises(BackboneError, match="No usable tokenizer"):
        load_tokenizer(t5_folder)


def test_fp16_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.dtype.*fp16 breaks T5.*bf16"):
        load_recipe(TuneConfig, None, ["backbone.dtype=fp16"])


def test_the_identity_is_that_of_the_weights_in_any_precision(
    tiny_t5: Path, t5_folder: Path
) -> None:
    digest = load(tiny_t5).identity.digest
    assert len(digest) == 32
    bf16 = load(t5_folder, dtype="bf16")
    assert bf16.dtype == torch.bfloat16
    assert bf16.identity.digest == load(t5_folder).identity.digest == digest

    def nudge(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["lm_head.weight"][0, 0] += 0.5
        return weights

    change_weights(t5_folder, nudge)
    assert load(t5_folder).identity.digest != digest


def test_families_do_not_share_an_identity(tiny_t5: Path, tiny_llama: Path) -> None:
    assert load(tiny_t5).identity.digest != load(tiny_llama).identity.digest
    assert AutoModelForCausalLM.from_pretrained(str(tiny_llama)).config.tie_word_embeddings
