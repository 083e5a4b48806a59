"""Rows of files one after another, with the line they stand in and what is wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from softprompt_dist.data import rows
from softprompt_dist.data.rows import read_file, stream_rows
from softprompt_dist.errors import DataError
from tests import runs


def numbers_and_lines(path: Path) -> list[tuple[int, int | None]]:
    return [(row.number, row.where.line) for row in stream_rows(path)]


def test_rows_are_numbered_and_lines_counted_with_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n  \n{"n": 2}\r\n{"n": 3}')
    assert numbers_and_lines(path) == [(1, 1), (2, 4), (3, 5)]
    assert str(list(stream_rows(path))[1].where) == "Line 4 of a.jsonl"


def test_a_csv_row_stands_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",1\n\nx,2\n')
    assert numbers_and_lines(path) == [(1, 2), (2, 5)]
    assert [row.row["text"] for row in stream_rows(path)] == ["two\nlines", "x"]


def test_parquet_has_rows_and_no_lines(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": [5, 6, 7]}), path, row_group_size=2)
    assert numbers_and_lines(path) == [(1, None), (2, None), (3, None)]
    assert str(next(stream_rows(path)).where) == "Row 1 of a.parquet"
    assert [row.row for row in stream_rows(path)] == [{"n": 5}, {"n": 6}, {"n": 7}]


def test_a_parquet_file_of_many_batches_comes_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(rows, "ROWS_AT_A_TIME", 4)
    parquet.write_table(pa.table({"n": list(range(11))}), tmp_path / "a.parquet", row_group_size=6)
    found = [
        (numbered.number, numbered.row["n"]) for numbered in stream_rows(tmp_path / "a.parquet")
    ]
    assert found == [(n + 1, n) for n in range(11)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(runs.LFS_POINTER)
    with pytest.raises(DataError, match=r"Is a Git LFS pointer: fetch the file itself"):
        list(stream_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.jsonl", '{"n": 1}\n\n{"n": \n{"n": 3}\n', 3, "Line 3 of a.jsonl is not JSON"),
        ("a.jsonl", '{"n": 1}\n[2]\n{"n": 3}\n', 2, "Line 2 of a.jsonl is not a JSON object"),
        ("a.jsonl", f'{{"n": 1}}\n{"[" * 9999}\n{{"n": 3}}\n', 2, "Line 2 of a.jsonl is not JSON"),
        ("a.jsonl", '{"n": 1}\n{"n": 2, "n": 2}\n{"n": 3}\n', 2, "Line 2 of a.jsonl: the key 'n'"),
        ("a.csv", "n\n1\n2,2\n3\n", 3, "Line 3 of a.csv has not as many columns as the header: 2"),
        ("a.csv", 'n\n1\n"2"2\n3\n', 3, "Line 3 of a.csv is not CSV"),
    ],
)
def test_behind_a_broken_row_the_others_still_come(
    tmp_path: Path, name: str, content: str, line: int, words: str
) -> None:
    (tmp_path / name).write_text(content)
    rows = list(stream_rows(tmp_path / name))
    assert [bool(row.error) for row in rows] == [False, True, False]
    assert str(rows[2].row["n"]) == "3"
    assert rows[1].where.line == line
    assert words in str(rows[1].error)
    with pytest.raises(DataError, match=words):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b'text\nfine\n"never closed\nx\n', "opened in line 3 is never closed"),
        ("a.csv", b"text,text\na,b\n", "names the column 'text' twice"),
        ("a.csv", b'"te"xt\na\n', "Line 1 of a.csv is not a CSV header"),
        ("a.jsonl", b'{"t": "caf\xe9"}\n', "must be UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"t": "a"}\n' * 99)[:30], "Check that the file is whole"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_an_error(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(stream_rows(tmp_path / name))


def test_a_missing_file_is_refused_before_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match=r"Did you mean 'rows\.jsonl'"):
        stream_rows(tmp_path / "row.jsonl")
    with pytest.raises(DataError, match="must end in"):
        stream_rows(Path(__file__))


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text("")
        assert read_file(tmp_path / name).rows == []


def test_a_long_document_fits_a_csv_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'word ' * 40_000}\n")
    assert len(read_file(path).rows[0]["text"]) == 200_000


def test_the_file_is_read_as_rows_are_asked_for(tmp_path: Path) -> None:
    """What stands far behind the first row has not been looked at when that is there."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(50_000)))
    with path.open("ab") as file:
        file.write(b"\xff\n")
    rows = stream_rows(path)
    assert next(rows).row == {"n": 0}
    with pytest.raises(DataError, match="UTF-8"):
        list(rows)
