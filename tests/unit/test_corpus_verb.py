"""`softprompt corpus`: what it builds, prints and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from softprompt_dist.corpus import main
from softprompt_dist.data.lm.corpus import built_corpora, open_corpus
from softprompt_dist.errors import ConfigError, DataError
from tests.corpora import LINES, TINY_T5, contents, documents_in, ids_of, tiny_t5, write_lines


def run(capsys, *arguments):
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_build_show_verify(tmp_path, capsys):
    text = write_lines(tmp_path / "a.txt", [*LINES, "", "\x00"])
    rows = tmp_path / "b.jsonl"
    rows.write_text(json.dumps({"body": "one more"}) + "\n")
    out = tmp_path / "out"
    said = run(capsys, "build", out, text, "--tokenizer", TINY_T5, "--skip-bad", "--workers", 1)
    for part in ("documents   40\n", "1 empty documents, 1 bad rows", "uint16", "tiny-t5 ("):
        assert part in said
    assert f"corpus: [{out}]" in said
    said = run(capsys, "show", out, "--documents", 2)
    assert "The first 2 of 40 documents" in said
    assert said.splitlines()[-2].endswith(f'  "{LINES[0]}"')
    assert "1 shards match" in run(capsys, "verify", out)
    arguments = ("--tokenizer", TINY_T5, "--field", "body", "--workers", 1)
    run(capsys, "build", tmp_path / "rows", rows, *arguments)
    assert '"one more"' in run(capsys, "show", tmp_path / "rows")


def test_a_long_document_is_shown_in_part(tmp_path, capsys):
    text = write_lines(tmp_path / "a.txt", ["word " * 5000])
    run(capsys, "build", tmp_path / "out", text, "--tokenizer", TINY_T5, "--workers", 1)
    assert len(run(capsys, "show", tmp_path / "out").splitlines()[-1]) < 400


def test_verify_names_the_file(tmp_path, capsys):
    text = write_lines(tmp_path / "a.txt")
    run(capsys, "build", tmp_path / "out", text, "--tokenizer", TINY_T5, "--workers", 1)
    path = tmp_path / "out" / "shard-00000.tokens"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"shard-00000\.tokens has sha256"):
        main(["verify", str(tmp_path / "out")])


def test_parts_are_built_apart_and_shown_together(tmp_path, capsys):
    texts = [write_lines(tmp_path / f"{n}.txt", LINES[n::5]) for n in range(5)]
    arguments = ["build", tmp_path / "out", *texts, "--tokenizer", TINY_T5, "--workers", 1]
    for part in (2, 1):
        run(capsys, *arguments, "--part", f"{part}/2")
    tokenizer = tiny_t5()
    source = open_corpus([str(tmp_path / "out")], tokenizer, tmp_path)
    order = [line for n in (0, 2, 4, 1, 3) for line in LINES[n::5]]
    assert documents_in(source) == ids_of(tokenizer, order)
    assert [c.manifest.part for c in built_corpora(tmp_path / "out")] == ["1/2", "2/2"]
    assert "documents   40\n" in run(capsys, "show", tmp_path / "out")
    assert run(capsys, "verify", tmp_path / "out").count("match") == 2
    with pytest.raises(DataError, match=r"--part 6/6 needs at least 6 source files.*are 5"):
        run(capsys, *arguments, "--part", "6/6")


def test_a_killed_build_leaves_no_process_and_goes_on(tmp_path):
    lines = [f"{line} {n}" for n in range(1600) for line in LINES]
    text = write_lines(tmp_path / "a.txt", lines)
    command = [sys.executable, "-m", "softprompt_dist.corpus", "build", "OUT", str(text)]
    command += ["--tokenizer", str(TINY_T5), "--workers", "2", "--shard-tokens", "100000"]
    command[4] = str(tmp_path / "out")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        first = tmp_path / "out" / "shard-00000.offsets"
        while not first.exists() and process.poll() is None:
            time.sleep(0.01)
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "manifest.json").exists()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if is_running(pid)] == []
    arguments = ["--tokenizer", str(TINY_T5), "--shard-tokens", "100000", "--workers", "1"]
    for folder in ("out", "whole"):
        main(["build", str(tmp_path / folder), str(text), *arguments])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_is_mistyped_is_a_message(tmp_path):
    text = str(write_lines(tmp_path / "a.txt"))
    build = ["build", str(tmp_path / "out"), text, "--tokenizer", str(TINY_T5)]
    for arguments, message in (
        ([*build, "--part", "0/3"], "0/3 is no part; write 1/16"),
        ([*build, "--part", "4/3"], "4/3 is no part"),
        ([*build, "--workers", "0"], "must be a whole number of at least 1"),
        ([*build, "--workers", "two"], "two' must be a whole number"),
        (["build", text], "SOURCE"),
        (["bild"], "invalid choice: 'bild'"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(arguments)
    (tmp_path / "none").mkdir()
    with pytest.raises(Exception, match="No tokenizer in"):
        main([*build[:-1], str(tmp_path / "none")])
    with pytest.raises(DataError, match="is no corpus"):
        main(["show", str(tmp_path)])
    with pytest.raises(DataError, match="a.txt is a file, and a corpus is a folder"):
        main(["show", text])
    with pytest.raises(DataError, match="Cannot make the folder .*Not a directory. Choose"):
        main(["build", f"{text}/below", *build[2:]])
