"""A backbone that is damaged or fits nothing, and a cell that is not there: one message each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt_dist import train
from softprompt_dist.backbone.load import load_tokenizer
from softprompt_dist.checks.job_files import check_backbone_files
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError
from tests import runs
from tests.messages import Said, assert_message

pytestmark = pytest.mark.usefixtures("lone_process")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny_t5: Path, tmp_path: Path) -> Path:
    """A copy of the tiny T5 that a test may damage."""
    return Path(shutil.copytree(tiny_t5, tmp_path / "t5"))


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_backbone(said: Said, tiny_recipe: Path, folder: Path, damage: str) -> None:
    (folder / damage).write_bytes(b"{")
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", folder.parent / "run"]
    assert_message(said(train.main, "--recipe", tiny_recipe, *arguments), folder)


def with_value(weights: Tensors, name: str, value: float) -> Tensors:
    """One value of row 3 is another."""
    changed = weights[name].clone()
    changed.view(len(changed), -1)[3, -1] = value
    return {**weights, name: changed}


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "tokenizer.json",
        "pytorch_model.bin",
        "config.json",
        "tokenizer_config.json",
    ],
)
def test_a_pointer_of_git_lfs_is_told(
    said: Said, tiny_recipe: Path, folder: Path, name: str
) -> None:
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(runs.LFS_POINTER)
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", folder.parent / "run"]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, "Is a Git LFS pointer: fetch the file itself", folder / name)


HEAD, WO = "lm_head.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight"
MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "a tensor is missing": (
        lambda w: {n: t for n, t in w.items() if n != WO},
        ("lacks 1 tensors", WO, "Fetch the checkpoint again"),
    ),
    "the head is missing": (
        lambda w: {n: t for n, t in w.items() if n != HEAD},
        ("lacks 1 tensors", HEAD, "a head of its own", "Fetch the checkpoint again"),
    ),
    "a tensor has another shape": (
        lambda w: {**w, WO: w[WO][:, :-1].contiguous()},
        (f"{WO} is (32, 63), not (32, 64)", "Use the config.json that belongs"),
    ),
    "a matrix is a vector": (
        lambda w: {**w, WO: w[WO][0].clone()},
        (f"{WO} is (64,), not (32, 64)", "Use the config.json that belongs"),
    ),
    "tensors that belong nowhere": (
        lambda w: {**w, "adapter.a": torch.ones(2), "adapter.b": torch.ones(2)},
        ("holds 2 tensors", "['adapter.a', 'adapter.b']", "Use the config.json that belongs"),
    ),
    "two embedding tables": (
        lambda w: {
            **{n: t for n, t in w.items() if n != "shared.weight"},
            "encoder.embed_tokens.weight": w["shared.weight"],
            "decoder.embed_tokens.weight": w["shared.weight"] + 1,
        },
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "which are different"),
    ),
    **{
        f"{value} in {name}": (
            lambda w, name=name, value=value: with_value(w, name, value),
            (f"holds {what}, which is no weight, in row 3 of {name}", "fetch it again"),
        )
        for name, value, what in (
            (HEAD, torch.nan, "NaN"),
            (WO, torch.nan, "NaN"),
            ("shared.weight", -torch.inf, "an infinite value"),
            ("decoder.final_layer_norm.weight", torch.nan, "NaN"),
            ("decoder.final_layer_norm.weight", torch.inf, "an infinite value"),
        )
    },
    "codes for numbers": (
        lambda w: {**w, WO: w[WO].to(torch.int8)},
        (f"{WO} (torch.int8)", "Set backbone.path to the original checkpoint"),
    ),
}


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_their_config(
    said: Said, tiny_recipe: Path, folder: Path, case: str, quantization: str
) -> None:
    change, parts = MISFITS[case]
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", folder.parent / "run"]
    arguments += ["--set", f"backbone.quantization={quantization}"]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, folder, *parts)


def test_a_tokenizer_with_pieces_that_the_table_lacks(
    said: Said, tiny_recipe: Path, folder: Path, tmp_path: Path
) -> None:
    tokenizer = runs.train_tokenizer()
    num_unused = runs.VOCABULARY - len(tokenizer)
    tokenizer.add_tokens([f"[{number}]" for number in range(num_unused)])
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).convert_tokens_to_ids("[0]") == runs.VOCABULARY - num_unused

    tokenizer.add_tokens(["[one]", "[two]"])
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # said before any weight is looked for
    parts = ("has 2 pieces, such as '[one]'", f"beyond the {runs.VOCABULARY} rows", "Take the")
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", tmp_path / "run"]
    assert_message(said(train.main, "--recipe", tiny_recipe, *arguments), folder, *parts)
    config = BackboneConfig(path=str(folder))
    told = {finding.name: finding.remedy for finding in check_backbone_files(folder, config)}
    assert parts[0] in told["tokenizer"]


def test_special_pieces_that_nothing_asks_for_need_no_row(tiny_llama: Path, tmp_path: Path) -> None:
    """As the image pieces of decoder-only models that read text alone here."""
    tokenizer = runs.train_tokenizer()
    tokenizer.add_tokens([f"[{n}]" for n in range(runs.VOCABULARY - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).convert_tokens_to_ids("<image>") == runs.VOCABULARY
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(BackboneError, match="has 1 pieces, such as '<image>'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("missing_bytes", [1, 5000])
def test_a_truncated_backbone(
    said: Said, tiny_recipe: Path, folder: Path, missing_bytes: int
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-missing_bytes])
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", folder.parent / "run"]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, file, "damaged or incomplete", "fetch it again")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"d_ff": 48},
            ("disagree about 12 tensors", "DenseReluDense.wi_0.weight is (64, 32), not (48, 32)"),
        ),
        ({"num_layers": 3}, ("lacks 9 tensors", "encoder.block.2")),
        ({"num_decoder_layers": 1}, ("holds 14 tensors", "decoder.block.1")),
        ({"feed_forward_proj": "relu"}, ("lacks 4 tensors", "DenseReluDense.wi.weight")),
        ({"feed_forward_proj": "gated-tanh"}, ("activation 'tanh'", "not known here")),
    ],
)
def test_a_config_that_does_not_fit_its_weights(
    said: Said,
    tiny_recipe: Path,
    folder: Path,
    settings: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    values = json.loads((folder / "config.json").read_text())
    for name in ("dense_act_fn", "is_gated_act"):
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**values, **settings}))
    arguments = ["--set", f"backbone.path={folder}", "--run-dir", folder.parent / "run"]
    assert_message(said(train.main, "--recipe", tiny_recipe, *arguments), *parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            ["quantization=nf4", "sharding=zero3"],
            ("'nf4'", "whole on every rank", "Set quantization=int8, or sharding=replicated"),
        ),
        (["quantization=llm_int8", "sharding=zero3"], ("'llm_int8'", "Set quantization=int8")),
        (["quantization=int4"], ("backbone.quantization", "'int4'", "'none', 'int8'")),
        (["offload=cpu"], ("'cpu'", "'replicated'", "Set sharding=zero3, or offload=none")),
        (["offload=nvme", "sharding=zero3"], ("'nvme'", "offload_path is None")),
        (["offload_path=/x", "sharding=zero3"], ("'none'", "offload_path is '/x'")),
        (["shard_group=node"], ("'node'", "'replicated'", "Set sharding=zero3")),
        (["activation_checkpointing=every_0"], ("activation_checkpointing", "'every_0'")),
        (["shard_grop=node"], ("'backbone.shard_grop'", "Did you mean 'shard_group'?")),
    ],
)
def test_a_cell_that_does_not_exist(
    said: Said, tiny_recipe: Path, settings: list[str], parts: tuple[str, ...]
) -> None:
    arguments = [word for one in settings for word in ("--set", f"backbone.{one}")]
    assert_message(said(train.main, "--recipe", tiny_recipe, *arguments), *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"softprompt": {"quantisation": "int8"}}, ("quantisation", "'quantization'?")),
        ({"softprompt": {"quantization": "nf4"}}, ("'nf4'", "'zero3'", "Set quantization=int8")),
        ({"softprompt": {"quantization": 8}}, ("quantization is 8", "'none', 'int8'")),
    ],
)
def test_a_ds_config_that_asks_for_what_is_not_there(
    said: Said, tiny_recipe: Path, tmp_path: Path, values: dict[str, Any], parts: tuple[str, ...]
) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({**runs.PARTITION_EVERYTHING, **values}))
    arguments = ["--recipe", tiny_recipe, "--deepspeed_config", file]
    assert_message(said(train.main, *arguments), "ds_config", *parts)


def test_an_off_load_folder_that_cannot_be_written(
    said: Said, tiny_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "parts"
    arguments = ["sharding=zero3", "offload=nvme", f"offload_path={folder}"]
    options = [word for one in arguments for word in ("--set", f"backbone.{one}")]
    outcome = said(train.main, "--recipe", tiny_recipe, *options, "--run-dir", tmp_path / "run")
    assert_message(outcome, f"backbone.offload_path {folder}", "or use backbone.offload=cpu")
