"""Screens that lack a character, and readers that leave: in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = """
import sys
from softprompt_dist import screen
from softprompt_dist.parallel.verb import run_verb
def main(argv):
    if argv[0] == "works":
        screen.outlive_readers()
    print('{"answer": "na\\u00efve \\U0001f600"}', flush=True)
    print("and on", flush=True)
    print("said", file=sys.stderr)
    open(argv[1], "w").write("done")
run_verb(main, sys.argv[1:])
"""
LISTINGS = (["tasks", "list"], ["--help"], ["plan", "--model", "google/t5-v1_1-small"])


def started(*command: str, reader: str = "stays", **environment: str) -> tuple[int, str, str]:
    """Exit code, and what was said to a reader that `stays`, or one that `left` at once."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    if reader == "left":
        process.stdout.close()
        assert process.stderr is not None
        said, err = b"", process.stderr.read()
        process.wait(timeout=120)
    else:
        said, err = process.communicate(timeout=120)
    return process.returncode, said.decode("latin-1"), err.decode("latin-1")


@pytest.mark.parametrize("verb", LISTINGS, ids=lambda verb: verb[0])
def test_a_listing_that_nobody_reads_ends_quietly(verb: list[str]) -> None:
    code, _, err = started("-m", "softprompt_dist.cli", *verb, reader="left")
    assert (code, err) == (141, "")


def test_a_listing_that_the_disk_does_not_take_says_so() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "softprompt_dist.cli", "tasks", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "error: Cannot read or write: No space left on device." in done.stderr


@pytest.mark.parametrize(("kind", "code"), [("lists", 141), ("works", 0)])
def test_work_goes_on_when_its_reader_leaves(tmp_path: Path, kind: str, code: int) -> None:
    result = tmp_path / "result"
    assert started("-c", SAYS, kind, str(result), reader="left")[0] == code
    assert result.exists() == (kind == "works")


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_a_character_that_the_screen_lacks_is_escaped(tmp_path: Path, encoding: str) -> None:
    told = started("-c", SAYS, "lists", str(tmp_path / "result"), PYTHONIOENCODING=encoding)
    assert (told[0], told[2]) == (0, "said\n")
    line = told[1].encode("latin-1").decode(encoding).splitlines()[0]
    assert json.loads(line) == {"answer": "na\u00efve \U0001f600"}


@pytest.mark.parametrize("reader", ["stays", "left"])
def test_a_run_is_complete_whatever_becomes_of_its_log(
    tiny_recipe: Path, tmp_path: Path, reader: str
) -> None:
    run_dir = tmp_path / "na\u00efve \U0001f600"
    settings = ["steps=2", f"run_directory={run_dir}"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = ["-m", "softprompt_dist.train", "--recipe", str(tiny_recipe), *overrides]
    code, said, err = started(*command, reader=reader, PYTHONIOENCODING="ascii")
    assert code == 0, err
    assert (run_dir / "why").read_text() == "done\n"
    assert (run_dir / "DONE").read_text() == "2\n"
    assert ("na\\u00efve \\ud83d\\ude00" in said) == (reader == "stays")
