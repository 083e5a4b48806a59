"""Planted secrets: whole runs leave none of them in any file, on the screen or in a log.

The same runs, under `umask 077`, show who may read what they write, and of what kinds it is.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softprompt_dist import adapt, evaluate, train
from softprompt_dist.backbone.engine import read_engine_config
from softprompt_dist.config import TuneConfig
from softprompt_dist.durable import replace_file, write_file
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.redaction import REDACTED, redact_output, redact_text
from tests import adaptations, runs
from tests.messages import Said

VARIABLES = {
    "HF_TOKEN": "canary-of-the-hub",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/cloud=",
    "WANDB_API_KEY": "0123456789abcanary0123456789abcdef0123",
    "DATABASE_PASSWORD": "canary with blanks",
}
IN_TEXT = [
    "hf_canaryABCDEFGHIJKLMNOP",
    "ghp_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ0123",
    "sk-canary-ABCDEFGHIJKLMNOP",
    "https://user:canary@example.org/data.jsonl",
    "eyJcanary00000.eyJcanary00000.canary",
]
KINDS = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".png", ".txt", "tfevents"}
WITHOUT_KIND = {"DONE", "why", "step", "STOP"}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries in the environment, and on a command line that only this process shows."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "--hub-token", "canary-1", "WANDB_API_KEY=canary-2", *IN_TEXT]
    )


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_no_canary(folder: Path, *texts: str) -> None:
    found = [path for path in files_of(folder) if b"canary" in path.read_bytes()]
    assert found == []
    named = [path for path in folder.rglob("*") if "canary" in path.name]
    assert named == []
    assert [text for text in texts if "canary" in text] == []


def assert_private(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.lstat().st_mode) == expected, path


def assert_known_kinds(folder: Path) -> None:
    named = [path for path in files_of(folder) if path.name not in WITHOUT_KIND]
    kinds = {"tfevents" if "tfevents" in path.name else path.suffix for path in named}
    assert kinds - KINDS == set()


@pytest.mark.drill("D35", "D36")
@pytest.mark.usefixtures("planted", "strict_umask", "lone_process")
def test_a_tuning_and_its_evaluation_leave_no_secret(
    said: Said, tiny_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    options = ["--recipe", tiny_recipe, "--run-dir", folder, "--steps", "2", "--debug"]
    code, *texts = said(train.main, *options)
    assert code == 0
    assert REDACTED in (folder / "environment.json").read_text()
    prompt = folder / "prompt" / "best.safetensors"
    code, *more = said(evaluate.main, "--prompt", prompt, "--output", folder / "evaluation")
    assert code == 0
    assert_no_canary(folder, *texts, *more, caplog.text)
    assert_private(folder)
    assert_known_kinds(folder)


@pytest.mark.drill("D35", "D36")
@pytest.mark.usefixtures("planted", "strict_umask", "world_of_adaptations")
def test_an_adaptation_leaves_no_secret(
    said: Said, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = adaptations.write_recipe(tmp_path, adaptations.recipe_values(tmp_path, steps=2))
    folder = tmp_path / "run"
    code, *texts = said(adapt.main, "--recipe", recipe, "--run-dir", folder, "--debug")
    assert code == 0
    assert_no_canary(folder, *texts, caplog.text)
    assert_private(folder)
    assert_known_kinds(folder)


@pytest.mark.drill("D35")
@pytest.mark.usefixtures("planted", "lone_process")
def test_a_run_that_fails_says_no_secret(said: Said, tiny_recipe: Path, tmp_path: Path) -> None:
    rows = [{"text": "an apple", "label": VARIABLES["HF_TOKEN"]}, *runs.make_rows(9, 0)]
    data = runs.write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    code, out, err = said(
        train.main, "--recipe", tiny_recipe, "--run-dir", folder, "--debug",
        "--set", f"task.source.train={data}",
    )  # fmt: skip
    assert code == 2
    assert "Traceback" in err
    assert f"has the label '{REDACTED}'" in err
    assert_no_canary(folder, out, err)


@pytest.mark.usefixtures("planted", "lone_process")
@pytest.mark.parametrize(
    "setting",
    [
        *(f"task.source.train={text}" for text in IN_TEXT),
        f"task.source.name={VARIABLES['HF_TOKEN']}",
        f"task.labels={{a: {VARIABLES['WANDB_API_KEY']}}}",
        f"backbone.path={VARIABLES['DATABASE_PASSWORD']}",
        "task.labels={hf_canaryABCDEFGHIJKLMNOP: a}",
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_telling_it(
    said: Said, tiny_recipe: Path, tmp_path: Path, setting: str
) -> None:
    folder = tmp_path / "run"
    code, out, err = said(
        train.main, "--recipe", tiny_recipe, "--run-dir", folder, "--debug", "--set", setting
    )
    assert code == 2
    assert "looks like a password or an access token" in err
    assert "HF_TOKEN" in err
    assert_no_canary(tmp_path, out, err)


@pytest.mark.usefixtures("planted", "lone_process")
@pytest.mark.parametrize(
    "setting",
    ["hub.api_key=canary", "token=[canary", "steps=hf_canaryABCDEFGHIJKLMNOP"],
)
def test_an_override_that_is_wrong_besides_is_not_repeated(
    said: Said, tiny_recipe: Path, setting: str
) -> None:
    code, out, err = said(train.main, "--recipe", tiny_recipe, "--debug", "--set", setting)
    assert code == 2
    assert "canary" not in out + err


@pytest.mark.parametrize(
    ("section", "place"),
    [
        ({"comet": {"api_key": "canary"}}, "comet.api_key"),
        ({"wandb": {"team": "https://me:canary@example.org"}}, "wandb.team"),
        ({"tensorboard": {"job_name": "hf_canaryABCDEFGHIJKLMNOP"}}, "tensorboard.job_name"),
    ],
)
def test_a_ds_config_with_a_secret_is_refused(
    tmp_path: Path, section: dict[str, object], place: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **section}))
    with pytest.raises(ConfigError, match=f"an access token in {place}") as caught:
        read_engine_config(path)
    assert "canary" not in str(caught.value)


def test_a_recipe_file_with_a_secret_in_a_broken_line_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: [hf_canaryABCDEFGHIJKLMNOP")
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as caught:
        load_recipe(TuneConfig, path)
    assert "canary" not in str(caught.value)


@pytest.mark.usefixtures("planted")
def test_logs_and_tracebacks_of_bugs_are_redacted(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        redact_output()
        logging.getLogger("x").warning("a %s b %s", VARIABLES["HF_TOKEN"], IN_TEXT[3])
        try:
            raise RuntimeError(f"GET {IN_TEXT[3]} {VARIABLES['AWS_SECRET_ACCESS_KEY']}")
        except RuntimeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(factory)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.count(REDACTED) == 2
    assert caplog.text.count(REDACTED) == 2
    assert "canary" not in err + caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer=here",
        "max_tokens=128",
        "pad_token_id=0",
        "num_key_value_heads=0",
        "the key 'x' is unknown",
        "https://example.org/a@b",
        "skip_bad_rows=true",
        "/models/hf-t5-v1_1-xxl-lm-adapt",
        "/models/hf_t5_v1_1_xxl_lm_adapt",
        "runs/sk-boolq-seed0-lr03-second",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "text", ["a" * 10**6 + "=" + "token" * 10**5, "eyJ-" * 10**5, "hf_" * 10**5, "x://" * 10**5]
)
def test_a_long_text_is_searched_quickly(text: str) -> None:
    begin = time.process_time()
    redact_text(text)
    assert time.process_time() - begin < 5


def test_nobody_else_may_write_what_we_write(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_file(tmp_path / "new", b"")
        replace_file(tmp_path / "replaced", b"")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022
