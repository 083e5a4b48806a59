from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from softprompt_dist import __version__
from softprompt_dist.cli import VERBS, dispatch, module_of
from softprompt_dist.errors import ConfigError


@pytest.mark.parametrize("verb", VERBS)
def test_every_listed_verb_has_its_module(verb: str) -> None:
    assert importlib.util.find_spec(module_of(verb)) is not None


def test_help_lists_the_verbs_and_version_is_the_package_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dispatch(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)
    dispatch(["--version"])
    assert capsys.readouterr().out == f"softprompt-dist {__version__}\n"


def test_unknown_verb_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Unknown verb 'trian'. Did you mean 'train'"):
        dispatch(["trian"])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["doctor", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom softprompt_dist.cli import dispatch\n"
        f"try: dispatch({arguments})\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
