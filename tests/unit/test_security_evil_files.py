"""Files from somebody who means harm: no code runs, nothing is written elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from softprompt_dist import durable, inspect
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.rows import read_file
from softprompt_dist.durable import digest_of
from softprompt_dist.errors import (
    BackboneError,
    ConfigError,
    DataError,
    PromptFileError,
    SoftpromptError,
)
from softprompt_dist.prompt.file import MAX_VALUES, load_prompt
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.checkpoint_format import (
    MANIFEST,
    RANDOM_STATES,
    STATE,
    TENSORS,
    InvalidCheckpointError,
    encode_checkpoint,
    encode_manifest,
    read_checkpoint,
)
from softprompt_dist.run.session import train as tune
from tests import runs
from tests.fuzz.targets import METADATA
from tests.messages import Said, assert_message


@pytest.fixture
def payload(tmp_path: Path) -> Any:
    """A pickle that leaves a trace, where it is loaded."""

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    yield Payload()
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000020"
    folder.mkdir(parents=True)
    rng = [{"cpu": torch.get_rng_state()}]
    for name, content in encode_checkpoint(20, {"prompt": torch.ones(2, 3)}, {}, rng).items():
        (folder / name).write_bytes(content)
    return folder


def forge(folder: Path, **files: bytes) -> None:
    """Replace files of a checkpoint, and write the manifest that goes with them."""
    for name, content in files.items():
        (folder / {"tensors": TENSORS, "rng": RANDOM_STATES, "state": STATE}[name]).write_bytes(
            content
        )
    digests = {n: digest_of((folder / n).read_bytes()) for n in (TENSORS, RANDOM_STATES, STATE)}
    (folder / MANIFEST).write_bytes(encode_manifest(20, digests))


# Pickles


@pytest.mark.drill("D34")
def test_pickles_are_read_by_no_reader(
    payload: Any, checkpoint: Path, tmp_path: Path, said: Said
) -> None:
    stored = io.BytesIO()
    torch.save({"prompt": payload}, stored)
    for content in (pickle.dumps(payload), stored.getvalue()):
        prompt = tmp_path / "prompt.safetensors"
        prompt.write_bytes(content)
        with pytest.raises(PromptFileError, match=r"prompt\.safetensors.*never read"):
            load_prompt(prompt)
        assert_message(said(inspect.main, prompt), prompt)
        forge(checkpoint, tensors=content)
        with pytest.raises(InvalidCheckpointError, match="malformed"):
            read_checkpoint(checkpoint)
        for name in ("model.safetensors", "pytorch_model.bin"):
            folder = tmp_path / f"backbone-{name}"
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            with pytest.raises(BackboneError, match=name):
                CheckpointReader(folder)


# Prompts


@pytest.mark.drill("D34")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "format_version is '2'"),
        ({"identity": {"path": "a", "weights": 7}}, "identity.weights"),
        ({"identity": {"path": "a", "weights": "", "config": [1]}}, "identity.config"),
        ({"score": float("nan")}, "NaN is no number"),
        ({"score": 10**400}, "score"),
        ({"step": -1}, "step is not between"),
        ({"step": 2**60}, "step is not between"),
        ({"d_model": True}, "d_model is True"),
        ({"task": "\ud800"}, "without the metadata"),
        ({"prompt_length": MAX_VALUES, "d_model": 3}, "must be"),
    ],
)
def test_metadata_that_lie_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "prompt.safetensors"
    header = {"softprompt": json.dumps({**METADATA, **changes})}
    path.write_bytes(save({"prompt": torch.zeros(2, 3)}, header))
    with pytest.raises(PromptFileError, match=message) as caught:
        load_prompt(path)
    assert str(path) in str(caught.value)


def test_keys_that_stand_there_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    text = json.dumps(METADATA)[:-1] + ', "step": 7}'
    path.write_bytes(save({"prompt": torch.zeros(2, 3)}, {"softprompt": text}))
    with pytest.raises(PromptFileError, match="'step' stands there twice"):
        load_prompt(path)


def test_a_prompt_with_a_hole_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    rows, columns = 2**18, 2**20
    metadata = METADATA | {"prompt_length": rows, "d_model": columns}
    num_bytes = rows * columns * 4
    header = json.dumps(
        {
            "__metadata__": {"softprompt": json.dumps(metadata)},
            "prompt": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, num_bytes]},
        }
    ).encode()
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + num_bytes)
    with pytest.raises(PromptFileError, match=f"bytes, and a prompt file up to {MAX_VALUES:,}"):
        load_prompt(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "best.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    for read in (load_prompt, read_file, lambda p: load_recipe(TuneConfig, p)):
        with pytest.raises(SoftpromptError, match=path.name):
            read(path)


# Checkpoints


def test_a_socket_is_not_taken_for_a_disk_that_is_away(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable.time, "sleep", lambda _: pytest.fail("it is waited for"))
    monkeypatch.chdir(checkpoint)  # the name of a socket must be short
    Path("state.json").unlink()
    with socket.socket(socket.AF_UNIX) as own:
        own.bind("state.json")
        with pytest.raises(InvalidCheckpointError):
            read_checkpoint(checkpoint)


@pytest.mark.drill("D34")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tensors": save({"prompt": torch.full((2, 3), torch.nan)})}, "prompt has values that"),
        ({"state": b'{"step": 20, "world_size": 1, "state": []}'}, "malformed"),
        ({"state": b'{"step": 20, "world_size": -1, "state": {}}'}, "no whole number"),
        ({"state": b'{"step": true, "world_size": 1, "state": {}}'}, "no whole number"),
        ({"state": b'{"step": 21, "world_size": 1, "state": {}}'}, "step-00000021"),
        ({"state": b'{"step": 20, "step": 20, "world_size": 1, "state": {}}'}, "twice"),
        ({"state": b"[" * 100_000}, "nested too deep"),
    ],
)
def test_forged_checkpoints_are_refused(
    checkpoint: Path, files: dict[str, bytes], message: str
) -> None:
    read_checkpoint(checkpoint)
    forge(checkpoint, **files)
    with pytest.raises(InvalidCheckpointError, match=message):
        read_checkpoint(checkpoint)


@pytest.mark.drill("D34")
def test_a_checkpoint_is_its_own_files_and_no_links(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(checkpoint, elsewhere)
    checkpoint.symlink_to(elsewhere)
    with pytest.raises(InvalidCheckpointError, match="symbolic link"):
        read_checkpoint(checkpoint)
    checkpoint.unlink()
    shutil.copytree(elsewhere, checkpoint)
    for name in (TENSORS, MANIFEST):
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(elsewhere / name)
        with pytest.raises(InvalidCheckpointError, match=name):
            read_checkpoint(checkpoint)


@pytest.mark.drill("D34")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tensors", save({"prompt": torch.ones(7, 3), "best_prompt": torch.ones(7, 3)}), "prompt"),
        ("tensors", save({"other": torch.ones(1)}), "prompt, best_prompt"),
        ("rng", save({"rank0.cpu": torch.ones(3)}), "random states"),
        ("state", b"", "examples_consumed"),
    ],
    ids=["shape", "tensors", "random states", "counters"],
)
def test_a_run_refuses_a_forged_checkpoint_with_a_message(
    tiny_recipe: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    config = load_recipe(TuneConfig, tiny_recipe, [f"run_directory={tmp_path / 'run'}", "steps=2"])
    tune(config)
    forged = runs.checkpoint_folder(tmp_path / "run", 2)
    if name == "state":
        document = json.loads((forged / STATE).read_bytes())
        document["state"]["examples_consumed"] = "8"
        content = json.dumps(document).encode()
    files = {"tensors": TENSORS, "rng": RANDOM_STATES, "state": STATE}
    (forged / files[name]).write_bytes(content)
    digests = {n: digest_of((forged / n).read_bytes()) for n in files.values()}
    (forged / MANIFEST).write_bytes(encode_manifest(2, digests))
    (tmp_path / "run" / "DONE").unlink(missing_ok=True)
    with pytest.raises(SoftpromptError, match=f"did not write it: .*{message}.*--fresh"):
        tune(config.model_copy(update={"steps": 3}))


# YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2", r"'steps' stands there twice \(line 2, column 1\)"),
        ("a: " + "[" * 3000, "nested more than 32 deep"),
        ("a: &a [*a]", "stands for what it is part of"),
        ("name: !!python/object/apply:os.system [touch x]", "could not determine a constructor"),
        ("steps: " + "9" * 5000, "a number has more than 64 characters"),
        ("steps: 0x_", "'0x_' is no int"),
        ("name: 2026-13-45", "'2026-13-45' is no timestamp"),
        ("steps: !!bool foo", "'foo' is no bool"),
        ('name: "\\ud800"', r"U\+D800"),
        ('name: "a\\0b"', r"U\+0000"),
        ("? [a]\n: b", "a key is a list or a mapping"),
        ("optimizer: {learning_rate: .inf}", "finite"),
        ("#" * 300_000, "characters, and"),
    ],
)
def test_yaml_that_no_recipe_needs_is_refused_at_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(TuneConfig, recipe)


def test_a_billion_laughs_are_not_laughed(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="its aliases make it too large"):
        load_recipe(TuneConfig, recipe)


def test_aliases_within_reason_are_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: {labels: &labels {a: b}}\n"
        "mixture: {tasks: [{name: other, labels: *labels}]}\n"
        "optimizer: {<<: {learning_rate: 0.5}, name: adamw}\n"
    )
    config = load_recipe(TuneConfig, recipe)
    assert config.mixture.tasks[0].labels == {"a": "b"} == config.task.labels
    assert config.optimizer.learning_rate == 0.5


def test_a_line_without_end_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_dist.data.rows.LONGEST_ROW", 1000)
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text('{"a": "' + "x" * 2000)
        with pytest.raises(DataError, match=f"{name}.*line 1 has more than 1,000 characters"):
            read_file(tmp_path / name)
