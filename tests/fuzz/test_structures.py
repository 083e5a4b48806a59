"""Generated structures, where bytes at random come no further than the first bracket."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.lm.manifest import read_manifest
from softprompt_dist.data.reading import TaskReader
from softprompt_dist.data.rows import Place
from softprompt_dist.data.tasks import task_reader
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.names import is_name, name_of
from softprompt_dist.prompt.file import load_prompt
from softprompt_dist.recipe import load_recipe
from softprompt_dist.redaction import redact_text
from softprompt_dist.task_config import TaskConfig
from softprompt_dist.untrusted import parse_json
from softprompt_dist.yaml_reading import parse_yaml
from tests.fuzz.targets import METADATA

# DeepSpeed's extension, once loaded, takes away this process's smallest floats.
_NUMBERS = (
    st.integers() | st.floats(allow_subnormal=False) | st.sampled_from([2**63, -(10**30), 10**400])
)
_TEXTS = st.text(st.characters(codec=None), max_size=20)
_SCALARS = st.none() | st.booleans() | _NUMBERS | _TEXTS
VALUES = st.recursive(
    _SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(_TEXTS, below, max_size=4)
)


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many, always the same ones; files lie in a folder that they share."""
    return hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def is_read_or_refused(
    read: Callable[[], object], refusal: type[Exception] = SoftpromptError
) -> bool:
    """With a word why. Any other error passes through, and says what it was given."""
    try:
        read()
    except refusal as error:
        return bool(str(error))
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("structures")


@examples(80)
@hypothesis.given(values=st.dictionaries(st.sampled_from([*TuneConfig.model_fields, "x"]), VALUES))
def test_recipes(folder: Path, values: dict[str, Any]) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8", "backslashreplace")
    assert is_read_or_refused(lambda: load_recipe(TuneConfig, path))


@examples(120)
@hypothesis.given(changes=st.dictionaries(st.sampled_from([*METADATA, "other"]), VALUES))
def test_metadata_of_prompts(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "prompt.safetensors"
    header = {"softprompt": json.dumps({**METADATA, **changes})}
    path.write_bytes(save({"prompt": torch.zeros(2, 3)}, header))
    assert is_read_or_refused(lambda: load_prompt(path))


@examples(150)
@hypothesis.given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
    stated=st.tuples(st.integers(-1, 2**40), st.integers(-1, 2**40)),
)
def test_shapes_of_prompts(
    folder: Path, shape: list[int], dtype: torch.dtype, stated: tuple[int, int]
) -> None:
    path = folder / "shapes.safetensors"
    metadata = {**METADATA, "prompt_length": stated[0], "d_model": stated[1]}
    path.write_bytes(
        save({"prompt": torch.zeros(shape, dtype=dtype)}, {"softprompt": json.dumps(metadata)})
    )
    assert is_read_or_refused(lambda: load_prompt(path))


@examples(100)
@hypothesis.given(values=VALUES)
def test_manifests_of_corpora(folder: Path, values: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(values))
    assert is_read_or_refused(lambda: read_manifest(folder))


@pytest.fixture(scope="module", params=[None, "boolq", "copa", "multirc", "record", "wsc"])
def reader(request: pytest.FixtureRequest) -> TaskReader:
    named = {} if request.param is None else {"catalogue": request.param}
    return task_reader(TaskConfig.model_validate(named))


@examples(60)
@hypothesis.given(
    row=st.dictionaries(
        st.sampled_from(
            ["text", "label", "idx", "question", "passage", "paragraph", "qas", "target", "answers"]
        ),
        VALUES,
    )
)
def test_rows(reader: TaskReader, row: dict[str, Any]) -> None:
    assert is_read_or_refused(lambda: reader.read(row, Place("a.jsonl", 1, 1)))
    assert is_read_or_refused(lambda: reader.read_input(row, Place("a.jsonl", 1, 1)))


@examples(200)
@hypothesis.given(text=st.text(st.characters(codec=None) | st.sampled_from("[]{}:,&*!?|>-\n '\"")))
def test_text_that_may_be_yaml_or_json(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        assert is_read_or_refused(lambda parse=parse: parse(text), ValueError)


@examples(200)
@hypothesis.given(label=_TEXTS)
def test_any_label_has_a_folder_s_name(label: str) -> None:
    assert is_name(f"{name_of(label)}-validation")


@examples(200)
@hypothesis.given(
    before=st.text(string.punctuation + " \n"),
    secret=st.text(string.ascii_letters + string.digits, min_size=16, max_size=40),
    after=st.text(string.punctuation + " \n"),
)
def test_a_token_is_found_in_any_text(before: str, secret: str, after: str) -> None:
    for token in (f"hf_{secret}", f"HF_TOKEN={secret}", f"https://user:{secret}@example.org"):
        assert secret not in redact_text(f"{before} {token} {after}")
