"""Sources that hold no text, or not only: value, rule, remedy, and nothing half-written."""

import pytest

from softprompt_dist.data.lm import text_sources
from softprompt_dist.data.lm.corpus import BuiltCorpus
from softprompt_dist.data.lm.text_sources import file_source
from softprompt_dist.errors import DataError
from tests import runs
from tests.corpora import (
    LINES,
    build,
    contents,
    documents_in,
    ids_of,
    packed,
    read_in_small_batches,
    write_lines,
    write_parquet,
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path_factory):
    read_in_small_batches(monkeypatch, tmp_path_factory.mktemp("hub"))


BAD_ROWS = {
    "not UTF-8": ("a.txt", b"good\nca\xe9f\n", r"Line 2 of a\.txt is not UTF-8: byte 0xe9"),
    "NUL": ("a.txt", b"good\n\x00\x01\x02\n", r"Line 2 of a\.txt is binary: 3 of its 3"),
    "control": ("a.txt", b"good\n\x01\x02\x03a\n", r"Line 2 of a\.txt is binary: 3 of its 4"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', r"Line 3 of a\.jsonl is not JSON"),
    "key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"Line 1 .* stands there twice"),
    "a list": ("a.jsonl", b'["a"]\n', r"Line 1 of a\.jsonl is not a JSON object .* a list"),
    "no field": ("a.jsonl", b'{"txt": "a"}\n', r"has no field 'text' \(its fields: txt; --field"),
    "null": ("a.jsonl", b'{"text": null}\n', r"Line 1 of .* no text in its field 'text' but null"),
    "number": ("a.jsonl", b'{"text": 3}\n', r"no text in its field 'text' but a int"),
    "half": ("a.jsonl", b'{"text": "a\\ud800"}\n', r"half a character at position 1"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_and_leaves_nothing(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{message}.*--skip-bad"):
        build(tmp_path / "out", tokenizer, path)
    assert not (tmp_path / "out").exists()
    good = write_lines(tmp_path / "good.txt", ["some text"])
    total = build(tmp_path / "out", tokenizer, path, good, skip_bad=True).total
    assert total.bad_rows == 1
    assert total.documents >= 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.xz", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, tokenizer, name):
    (tmp_path / name).write_text(runs.LFS_POINTER)
    with pytest.raises(DataError, match=r"Is a Git LFS pointer: fetch the file itself"):
        build(tmp_path / "out", tokenizer, tmp_path / name)


def test_a_parquet_file_without_the_field_is_refused(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", LINES, "content")
    with pytest.raises(DataError, match=r"Row 1 of a\.parquet has no field 'text'.*id, content"):
        build(tmp_path / "out", tokenizer, path)
    build(tmp_path / "out", tokenizer, path, field_name="content")
    assert documents_in(BuiltCorpus(tmp_path / "out")) == ids_of(tokenizer, LINES)


def test_a_build_stopped_by_a_bad_row_goes_on_without_it(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.txt", [*LINES[:30], "\x00", *LINES[30:]])
    with pytest.raises(DataError, match=r"Line 31 of a\.txt"):
        build(tmp_path / "out", tokenizer, path, tokens_per_shard=100)
    build(tmp_path / "out", tokenizer, path, tokens_per_shard=100, skip_bad=True)
    build(tmp_path / "whole", tokenizer, path, tokens_per_shard=100, skip_bad=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert documents_in(BuiltCorpus(tmp_path / "out")) == ids_of(tokenizer, LINES)


def test_documents_may_be_tiny_and_rows_empty(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\r\n  \n\xe2\x80\x8b\nlast without an end")
    total = build(tmp_path / "out", tokenizer, path).total
    documents = documents_in(BuiltCorpus(tmp_path / "out"))
    assert documents == ids_of(tokenizer, ["a", "last without an end"])
    assert (total.documents, total.empty_documents) == (2, 3)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_no_text_at_all_is_refused_and_leaves_nothing(tmp_path, tokenizer, lines):
    path = write_lines(tmp_path / "blank.txt", lines)
    with pytest.raises(DataError, match=r"no text in blank\.txt: \d empty and 0 bad"):
        build(tmp_path / "out", tokenizer, path)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_text_files_are_refused(tmp_path, tokenizer):
    for name, remedy in {"a.csv": "jsonl", "a.zip": "Unpack", "a.txt.zst": "Unpack"}.items():
        (tmp_path / name).write_text("a,b")
        with pytest.raises(DataError, match=remedy):
            file_source(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        file_source(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="is a folder"):
        file_source(tmp_path)


def test_a_file_cut_off_is_named(tmp_path, tokenizer):
    path = packed(write_lines(tmp_path / "a.txt"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"Cannot read .*a\.txt\.gz"):
        build(tmp_path / "out", tokenizer, path)
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet"):
        build(tmp_path / "out", tokenizer, broken)


def test_a_line_without_an_end_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_sources, "LONGEST_LINE", 100)
    path = write_lines(tmp_path / "a.txt", ["short", "x" * 200])
    with pytest.raises(DataError, match=r"Line 2 of a\.txt is longer"):
        build(tmp_path / "out", tokenizer, path)
