"""Two folders are one backbone when their numbers are the same, and only then."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, normalizers
from transformers import AutoConfig, AutoTokenizer, T5Tokenizer

from softprompt_dist.backbone.load import load_embedding, load_tokenizer
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.identity import Identity

Change = Callable[[Path], None]


def identity_of(folder: Path) -> Identity:
    _, identity = load_embedding(BackboneConfig(path=str(folder)))
    return dataclasses.replace(identity, tokenizer=tokenizer_identity(load_tokenizer(folder)))


def copy_with(folder: Path, copy: Path, *changes: Change) -> Path:
    shutil.copytree(folder, copy)
    for change in changes:
        change(copy)
    return copy


def with_keys(**keys: Any) -> Change:
    """Into config.json; a key with the value ... is left out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | keys
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return change


def with_all_defaults(folder: Path) -> None:
    config = AutoConfig.from_pretrained(str(folder))
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))


def saved_again(folder: Path) -> None:
    AutoConfig.from_pretrained(str(folder)).save_pretrained(str(folder))


def with_dealt_out_pieces(folder: Path) -> None:
    """The pieces of the tokenizer, but for the special ones, in the reverse order."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    scores = [score for _, score in values["model"]["vocab"]]
    pieces = [piece for piece, _ in values["model"]["vocab"]]
    pieces[3:] = pieces[:2:-1]
    values["model"]["vocab"] = list(zip(pieces, scores, strict=True))
    path.write_text(json.dumps(values))


def with_lower_case(folder: Path) -> None:
    """The same vocabulary, read otherwise."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    tokenizer.save(str(path))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            with_keys(feed_forward_proj="gated-silu", dense_act_fn=...),
            "dense_act_fn: gelu_new there, silu here",
        ),
        (with_keys(layer_norm_epsilon=0.1), "layer_norm_epsilon: 1e-06 there, 0.1 here"),
        (
            with_keys(relative_attention_max_distance=40),
            "relative_attention_max_distance: 128 there, 40 here",
        ),
        (with_keys(decoder_start_token_id=5), "decoder_start_token_id: 0 there, 5 here"),
        (with_keys(made_up_factor=3), "made_up_factor: None there, 3 here"),
        (with_lower_case, "tokenizer.ids_of_probe: "),
        (with_dealt_out_pieces, "tokenizer.vocabulary: "),
    ],
)
def test_what_changes_the_numbers_of_a_t5_is_a_difference(
    tiny_t5: Path, tmp_path: Path, change: Change, difference: str
) -> None:
    there, here = identity_of(tiny_t5), identity_of(copy_with(tiny_t5, tmp_path / "t5", change))
    assert there.weights == here.weights
    found = there.differences(here)
    assert any(line.startswith(difference) for line in found), found
    assert here.differences(there)
    assert there.digest != here.digest


def test_what_changes_the_numbers_of_a_decoder_only_model_is_a_difference(
    tiny_llama: Path, tmp_path: Path
) -> None:
    ropes = {"rope_theta": 500000.0, "rope_type": "default"}
    other = copy_with(tiny_llama, tmp_path / "llama", with_keys(rope_parameters=ropes))
    found = identity_of(tiny_llama).differences(identity_of(other))
    assert found == ["rope_parameters.rope_theta: 10000.0 there, 500000.0 here"]


@pytest.mark.parametrize(
    "change",
    [
        saved_again,
        with_all_defaults,
        with_keys(layer_norm_epsilon=..., relative_attention_num_buckets=..., is_decoder=...),
        with_keys(tie_word_embeddings=False, scale_decoder_outputs=..., is_gated_act=...),
        with_keys(torch_dtype="bfloat16", dtype=..., _name_or_path="x", architectures=["T5Model"]),
        with_keys(transformers_version="4.30.0", use_cache=False, max_length=9, num_beams=4),
        with_keys(dropout_rate=0.3, initializer_factor=2.0, eos_token_id=9, id2label={"0": "a"}),
        with_keys(task_specific_params={"summarization": {"num_beams": 4}}, output_past=True),
        with_keys(model_parallel=False, some_day_a_switch=None),
    ],
)  # fmt: skip
def test_saving_a_config_anew_makes_no_other_backbone(
    tiny_t5: Path, tmp_path: Path, change: Change
) -> None:
    there, here = identity_of(tiny_t5), identity_of(copy_with(tiny_t5, tmp_path / "t5", change))
    assert there.differences(here) == []
    assert here.differences(there) == []


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_rope_as_transformers_4_wrote_it_is_the_same(
    tiny_llama: Path, tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    older = with_keys(rope_parameters=..., rope_theta=3e4, rope_scaling=scaling, head_dim=...)
    old = copy_with(tiny_llama, tmp_path / "old", older)
    new = copy_with(old, tmp_path / "new", saved_again)
    assert "rope_theta" not in json.loads((new / "config.json").read_text())
    assert identity_of(old).differences(identity_of(new)) == []


def test_fields_that_transformers_has_got_since_count_at_their_defaults(tiny_llama: Path) -> None:
    here = identity_of(tiny_llama)
    older = {n: v for n, v in here.config.items() if n not in ("head_dim", "rms_norm_eps")}
    there = dataclasses.replace(here, config=older)
    assert there.differences(here) == []
    other = dataclasses.replace(here, config={**here.config, "rms_norm_eps": 0.5})
    assert there.differences(other) == ["rms_norm_eps: 1e-06 there, 0.5 here"]


def test_what_is_not_known_is_not_compared(tiny_t5: Path) -> None:
    here = identity_of(tiny_t5)
    assert Identity("", "").differences(here) == []
    of_weights = Identity("", "0123", tokenizer={"vocabulary": here.tokenizer["vocabulary"]})
    assert of_weights.differences(here) == [f"weights: 0123 there, {here.weights} here"]


def test_precision_and_place_are_recorded_and_not_compared(tiny_t5: Path) -> None:
    here = identity_of(tiny_t5)
    _, halved = load_embedding(
        BackboneConfig(path=str(tiny_t5), sharding="replicated", dtype="bf16", quantization="nf4")
    )
    assert (halved.dtype, halved.quantization) == ("bf16", "nf4")
    assert dataclasses.replace(halved, path="elsewhere").differences(here) == []


def test_an_identity_survives_json(tiny_llama: Path) -> None:
    here = identity_of(tiny_llama)
    stored = json.loads(json.dumps(dataclasses.asdict(here)))
    assert Identity.from_json(stored | {"of_a_later_release": 1}) == here


def test_one_tokenizer_in_two_kinds_of_files_is_one(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of some green words and {i * 7} more" for i in range(300)))
    folder = tmp_path / "spiece"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=100, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False,
    )  # fmt: skip
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 10}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, T5Tokenizer)
    tokenizer.save_pretrained(str(tmp_path / "json"))
    again = AutoTokenizer.from_pretrained(str(tmp_path / "json"))
    assert not (tmp_path / "json" / "spiece.model").exists()
    assert tokenizer_identity(again) == tokenizer_identity(tokenizer)
