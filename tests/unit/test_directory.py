import json
import os

import pytest

from softprompt_dist.errors import MachineError
from softprompt_dist.redaction import REDACTED, redact_command
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.environment import describe_environment


def test_it_makes_the_folders_and_records_every_attempt(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "a")
    directory.create()
    directory.record("steps: 1\n", {"world_size": 2})
    directory.record("steps: 2\n", {"world_size": 1})
    assert directory.config.read_text() == "steps: 2\n"
    attempts = json.loads(directory.environment.read_text())["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [2, 1]
    assert sorted(path.name for path in directory.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "plots",
        "predictions",
        "prompt",
        "tensorboard",
    ]


def test_a_damaged_environment_file_does_not_stop_a_resume(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.environment.write_text('{"attempts": [')
    directory.record("", {"world_size": 1})
    assert len(json.loads(directory.environment.read_text())["attempts"]) == 1


def test_a_path_below_a_file_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"file/run cannot be written.*--run-dir"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_no_write_permission_is_found_at_once(tmp_path, monkeypatch):
    def denied(path, flags, *rest, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(MachineError, match=r"Permission denied.*--run-dir"):
        RunDirectory(tmp_path).create()


def test_the_environment_is_json_and_holds_what_a_repeat_needs(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-in-a-variable")
    text = json.dumps(describe_environment())
    assert "canary" not in text
    environment = json.loads(text)
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["world_size"] == 1
    assert environment["memory_bytes"] > 2**20
    assert environment["cpu_cores"] >= 1
    assert environment["python"].startswith("3.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hub-token", "canary"],
        ["--hub-token=canary"],
        ["HF_TOKEN=canary"],
        ["--set", "hub.api_key=canary"],
        ["--password", "canary"],
        ["https://user:canary@example.org/x"],
        ["hf_canaryABCDEFGHIJKLMNOP"],
    ],
)
def test_secrets_of_the_command_line_are_redacted(arguments):
    redacted = redact_command(["softprompt", "train", *arguments, "--steps", "5"])
    assert not any("canary" in argument for argument in redacted)
    assert any(REDACTED in argument for argument in redacted)
    assert redacted[:2] == ["softprompt", "train"]
    assert redacted[-2:] == ["--steps", "5"]


@pytest.mark.parametrize(
    "arguments",
    [["--set", "backbone.max_input_tokens=128"], ["--set", "tokenizer=here"], ["--key-free"]],
)
def test_ordinary_options_stay(arguments):
    assert redact_command(arguments) == arguments
