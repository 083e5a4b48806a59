import dataclasses
import json
import logging
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from softprompt_dist.errors import PromptFileError
from softprompt_dist.identity import Identity
from softprompt_dist.prompt.file import (
    PromptMetadata,
    joined,
    load_prompt,
    save_prompt,
)

METADATA = PromptMetadata(
    identity=Identity(
        "demo:tiny-t5",
        "f" * 32,
        {"model_type": "t5", "layer_norm_epsilon": 1e-6},
        {"vocabulary": "e" * 64},
        "bf16",
        "none",
    ),
    task="vader-movies",
    initialisation="class_labels",
    step=30_000,
    metric="accuracy",
    score=0.875,
    prompt_length=3,
    d_model=4,
    version="0.1.0",
)
PROMPT = torch.arange(12.0).reshape(3, 4) * 1e-3
OTHER = Identity("elsewhere", "0123")
HEADER = {"softprompt": json.dumps(dataclasses.asdict(METADATA))}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts" / "best.safetensors"


def with_metadata(**changes):
    return {"softprompt": json.dumps({**dataclasses.asdict(METADATA), **changes})}


def test_what_was_saved_is_loaded_to_the_bit(path):
    save_prompt(path, PROMPT, METADATA)

    prompt, metadata = load_prompt(path, backbone=METADATA.identity)

    assert torch.equal(prompt, PROMPT)
    assert metadata == METADATA
    assert os.listdir(path.parent) == [path.name]


def test_same_prompt_and_metadata_are_the_same_bytes(path):
    save_prompt(path, PROMPT, METADATA)
    first = path.read_bytes()

    save_prompt(path, PROMPT.clone().requires_grad_(), METADATA)

    assert path.read_bytes() == first


def test_loaded_prompt_outlives_the_file(path):
    save_prompt(path, PROMPT, METADATA)
    prompt, _ = load_prompt(path)

    path.write_bytes(b"\0" * path.stat().st_size)

    assert torch.equal(prompt, PROMPT)


def test_every_truncation_is_refused(path):
    save_prompt(path, PROMPT, METADATA)
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PromptFileError):
            load_prompt(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a prompt",
        os.urandom(4096),
        pickle.dumps({"prompt": [1.0]}),
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", (1 << 20) + 1) + b" " * (2 << 20),
    ],
    ids=["empty", "text", "noise", "pickle", "huge header", "no header", "header over the cap"],
)
def test_file_of_another_kind_is_refused(path, content):
    path.parent.mkdir()
    path.write_bytes(content)

    with pytest.raises(PromptFileError, match=r"best\.safetensors"):
        load_prompt(path)


def test_pickled_prompt_is_never_executed(path, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path.parent.mkdir()
    torch.save({"prompt": Payload()}, path)

    with pytest.raises(PromptFileError, match="never read"):
        load_prompt(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"prompt": PROMPT, "weight": PROMPT.clone()}, HEADER, "alone"),
        ({"weight": PROMPT}, HEADER, "alone"),
        ({"prompt": PROMPT}, None, "metadata"),
        ({"prompt": PROMPT}, {"softprompt": "{"}, "metadata"),
        ({"prompt": PROMPT}, {"softprompt": "[1]"}, "metadata"),
        ({"prompt": PROMPT}, with_metadata(step="1"), "step"),
        ({"prompt": PROMPT}, with_metadata(step=True), "step"),
        ({"prompt": PROMPT.bfloat16()}, HEADER, "float32"),
        ({"prompt": PROMPT.flatten()}, HEADER, r"\(3, 4\)"),
        ({"prompt": PROMPT}, with_metadata(prompt_length=4), r"\(4, 4\)"),
        ({"prompt": PROMPT[:0]}, with_metadata(prompt_length=0), r"\(0, 4\)"),
        ({"prompt": PROMPT / 0}, HEADER, "12 values .* NaN or infinite"),
    ],
)
def test_safetensors_that_are_no_prompt_file_are_refused(path, tensors, header, message):
    path.parent.mkdir()
    save_file(tensors, path, header)

    with pytest.raises(PromptFileError, match=message):
        load_prompt(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_path_without_a_file_is_refused(tmp_path, name):
    with pytest.raises(PromptFileError, match="Cannot read"):
        load_prompt(tmp_path / name)


def test_prompt_of_another_backbone_is_refused_showing_both(path):
    save_prompt(path, PROMPT, METADATA)

    with pytest.raises(PromptFileError, match=f"weights: {'f' * 32} there, 0123 here"):
        load_prompt(path, backbone=OTHER)


def test_prompt_of_another_backbone_can_be_forced_with_a_warning(path, caplog):
    save_prompt(path, PROMPT, METADATA)

    with caplog.at_level(logging.WARNING):
        prompt, _ = load_prompt(path, backbone=OTHER, force=True)

    assert torch.equal(prompt, PROMPT)
    assert "0123" in caplog.text
    assert METADATA.identity.weights in caplog.text


@pytest.mark.parametrize(
    "prompt",
    [PROMPT.bfloat16(), PROMPT[:2], torch.full((3, 4), float("nan"))],
    ids=["bf16", "shape", "nan"],
)
def test_bad_prompt_does_not_replace_a_good_file(path, prompt):
    save_prompt(path, PROMPT, METADATA)

    with pytest.raises(PromptFileError):
        save_prompt(path, prompt, METADATA)

    assert torch.equal(load_prompt(path)[0], PROMPT)


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(path, monkeypatch):
    save_prompt(path, PROMPT, METADATA)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))

    with pytest.raises(PromptFileError, match="No space"):
        save_prompt(path, PROMPT + 1, METADATA)

    assert torch.equal(load_prompt(path)[0], PROMPT)
    assert os.listdir(path.parent) == [path.name]


def test_a_prompt_of_several_tasks_knows_their_families():
    found = dataclasses.replace(METADATA, task_family=joined(["span", "own: a, b", "span"]))
    assert found.families == ("span", "own: a, b")


def test_a_prompt_knows_what_its_answers_begin_with(path):
    assert METADATA.target_prefixes == (None,)
    both = dataclasses.replace(METADATA, target_prefix=joined(["", "<extra_id_0>", ""]))
    assert both.target_prefixes == (None, "<extra_id_0>")
    save_prompt(path, PROMPT, both)
    assert load_prompt(path)[1] == both


def save_with(path, values):
    path.parent.mkdir(exist_ok=True)
    save_file({"prompt": PROMPT}, path, metadata={"softprompt": json.dumps(values)})
    return path


def of_release_0_1():
    """The metadata as that release wrote them, at first without `target_prefix`."""
    values = dataclasses.asdict(METADATA)
    for name in ("identity", "format_version", "target_prefix"):
        del values[name]
    return values | {
        "backbone": "demo:tiny-t5",
        "backbone_fingerprint": "f" * 32,
        "tokenizer_fingerprint": "e" * 64,
    }


def test_a_prompt_file_of_release_0_1_is_read_and_compared_by_what_it_has(path):
    save_with(path, of_release_0_1())
    prompt, metadata = load_prompt(path, backbone=METADATA.identity)
    assert torch.equal(prompt, PROMPT)
    known = Identity("demo:tiny-t5", "f" * 32, tokenizer={"vocabulary": "e" * 64})
    assert metadata == dataclasses.replace(METADATA, identity=known)
    assert metadata.target_prefixes == (None,)
    with pytest.raises(PromptFileError, match="weights: f+ there, 0123 here"):
        load_prompt(path, backbone=OTHER)
    other = dataclasses.replace(METADATA.identity, tokenizer={"vocabulary": "d" * 64})
    with pytest.raises(PromptFileError, match=r"tokenizer\.vocabulary: e+ there, d+ here"):
        load_prompt(path, backbone=other)


def test_keys_of_a_later_release_are_passed_over(path):
    later = dataclasses.asdict(METADATA) | {"of_a_later_release": [1]}
    assert load_prompt(save_with(path, later))[1] == METADATA


def test_a_later_format_is_refused_with_the_release_that_wrote_it(path):
    later = dataclasses.asdict(METADATA) | {"format_version": 3, "version": "7.1"}
    with pytest.raises(PromptFileError, match=r"version 3.*versions 1 to 2.*Install.*'7\.1'"):
        load_prompt(save_with(path, later))
