"""A release without the private names that we use fails by name, before it gives a number."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import softprompt_dist
from softprompt_dist import private_names
from softprompt_dist.checks.software import check_versions
from softprompt_dist.errors import MachineError
from softprompt_dist.private_names import PRIVATE_NAMES, TESTED_VERSIONS, assert_known

OURS = {"ds_config"}
OF_TORCH = {
    "_buffers",
    "_checkpoint_offset",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
}
"""That stay as long as PyTorch's own files are read by it."""
WITH_A_FALLBACK = {
    "_C",
    "_accelerator_getAllocatorSettings",
    "_accelerator_setAllocatorSettings",
}
"""A torch without them works, with more page-locked memory."""


@pytest.fixture
def without_ds_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the installed DeepSpeed called `ds_tensor` by another name."""
    spec = find_spec("deepspeed")
    assert spec is not None
    installed = Path(str(spec.origin)).parent
    for file in PRIVATE_NAMES["deepspeed"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / file, tmp_path / file)
    changed = tmp_path / "runtime/zero/partition_parameters.py"
    changed.write_text(changed.read_text().replace("ds_tensor", "ds_part"))
    find = private_names.missing_names
    monkeypatch.setattr(
        private_names,
        "missing_names",
        lambda library: find(library, tmp_path if library == "deepspeed" else None),
    )


def test_the_installed_libraries_have_them() -> None:
    for library in PRIVATE_NAMES:
        assert_known(library)


def test_one_that_is_missing_is_named_with_the_version_that_has_it(without_ds_tensor: None) -> None:
    missing = r"deepspeed .* lacks runtime/zero/partition_parameters.py: ds_tensor, .*deepspeed==0"
    with pytest.raises(MachineError, match=missing):
        assert_known("deepspeed")


def test_the_doctor_says_so(without_ds_tensor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "softprompt_dist.checks.software.missing_names", private_names.missing_names
    )
    failed = [f for f in check_versions(TESTED_VERSIONS.__getitem__) if f.status == "fail"]
    assert [finding.name for finding in failed] == ["deepspeed"]
    assert "ds_tensor" in failed[0].found


def used(path: Path) -> Iterator[str]:
    """Names of DeepSpeed's parameters, and names that a linter calls private, that a file uses."""
    text = path.read_text(encoding="utf-8")
    excused = {n for n, line in enumerate(text.splitlines(), 1) if "SLF001" in line}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            is_private = re.match("_[^_]", node.attr) and node.end_lineno in excused
            if node.attr.startswith("ds_") or is_private:
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (str(word) for word in words if re.match("_?ds_", str(word)))


def test_all_that_are_used_are_listed() -> None:
    listed = {
        n for files in PRIVATE_NAMES.values() for names in files.values() for n in names.split()
    }
    package = Path(softprompt_dist.__file__).parent
    found = {name for path in package.rglob("*.py") for name in used(path)}
    assert found - OURS - OF_TORCH - WITH_A_FALLBACK - listed == set()
    assert {"ds_tensor", "_hp_mapping", "_relative_position_bucket"} <= found
