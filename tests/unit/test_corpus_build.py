"""Any kind of source and whatever happens on the way: the right bytes in the end."""

import gzip
import lzma
import os
from dataclasses import dataclass

import pytest

from softprompt_dist.data.lm import build as build_module
from softprompt_dist.data.lm.build import BuildRequest, build_corpus
from softprompt_dist.data.lm.corpus import BuiltCorpus
from softprompt_dist.data.lm.hub_source import hub_files
from softprompt_dist.data.lm.shards import ShardWriter
from softprompt_dist.data.lm.text_sources import FileSource, file_source
from softprompt_dist.errors import DataError, MachineError
from tests.corpora import (
    LINES,
    build,
    contents,
    documents_in,
    ids_of,
    packed,
    read_in_small_batches,
    word_tokenizer,
    write_lines,
    write_parquet,
    write_texts,
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path_factory):
    read_in_small_batches(monkeypatch, tmp_path_factory.mktemp("hub"))


SOURCES = {
    "text": lambda folder: write_lines(folder / "a.txt"),
    "no ending": lambda folder: write_lines(folder / "a"),
    "gz": lambda folder: packed(write_lines(folder / "a.txt"), gzip),
    "xz": lambda folder: packed(write_lines(folder / "a.txt"), lzma),
    "jsonl": lambda folder: write_texts(folder / "a.jsonl", LINES),
    "json.gz": lambda folder: packed(write_texts(folder / "a.json", LINES), gzip),
    "parquet": lambda folder: write_parquet(folder / "a.parquet", LINES),
}


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_every_kind_of_file_gives_the_same_corpus(tmp_path, tokenizer, write):
    path = write(tmp_path)
    manifest = build(tmp_path / "out", tokenizer, path, tokens_per_shard=100)
    corpus = BuiltCorpus(tmp_path / "out")
    assert documents_in(corpus) == ids_of(tokenizer, LINES)
    assert len(manifest.shards) > 3
    assert manifest.total.text_bytes == sum(len(line.encode()) for line in LINES)
    text = build(tmp_path / "text", tokenizer, write_lines(tmp_path / "b"), tokens_per_shard=100)
    assert manifest.fingerprint == text.fingerprint
    assert (manifest.sources[0].name, manifest.token_dtype) == (path.name, "uint16")
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_data_set_of_the_hub_is_read_file_by_file(tmp_path, tokenizer):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        write_texts(folder / f"train-{number}.jsonl", LINES[number::3], "content")
    files = hub_files(f"hub:{folder}", split="train", revision=None, field_name="content")
    assert [file.name for file in files] == [f"set train {n}/3" for n in (1, 2, 3)]
    request = BuildRequest(files, "content", tokens_per_shard=100, workers=1)
    manifest = build_corpus(request, tokenizer, tmp_path / "out")
    assert documents_in(BuiltCorpus(tmp_path / "out")) == ids_of(
        tokenizer, LINES[0::3] + LINES[1::3] + LINES[2::3]
    )
    assert [source.name for source in manifest.sources] == [file.name for file in files]
    with pytest.raises(DataError, match="Cannot load data set"):
        hub_files(f"hub:{folder}", split="absent", revision=None, field_name="content")
    with pytest.raises(DataError, match="names no data set"):
        hub_files("hub:", split="train", revision=None, field_name="content")


def test_ids_that_need_it_take_four_bytes(tmp_path):
    lines = ["w69999 w1", "w2"]
    manifest = build(tmp_path / "out", word_tokenizer(70_000), write_lines(tmp_path / "a", lines))
    assert manifest.token_dtype == "uint32"
    assert documents_in(BuiltCorpus(tmp_path / "out")) == [[70_000, 2], [3]]
    assert (tmp_path / "out" / "shard-00000.tokens").read_bytes()[:4] == (70_000).to_bytes(
        4, "little"
    )


def test_the_number_of_workers_changes_no_byte(tmp_path, tokenizer):
    paths = [write_lines(tmp_path / f"{n}.txt", LINES[n:]) for n in range(3)]
    for workers in (1, 3):
        build(tmp_path / str(workers), tokenizer, *paths, tokens_per_shard=150, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@dataclass(frozen=True)
class Interrupted(FileSource):
    """Ends the process, as it were, after some batches."""

    batches: int = 0

    def rows(self, number, first_row):
        for count, rows in enumerate(super().rows(number, first_row)):
            if count == self.batches:
                raise KeyboardInterrupt
            yield rows


def interrupt(request, folder, tokenizer, source, batches):
    sources = [*request.sources]
    file = sources[source]
    sources[source] = Interrupted(file.path, file.format, file.field_name, batches)
    settings = {**vars(request), "sources": sources}
    with pytest.raises(KeyboardInterrupt):
        build_corpus(BuildRequest(**settings), tokenizer, folder)


def untidy_request(tmp_path):
    """Empty and bad rows everywhere, also at the ends of files."""
    lines = ["", *LINES[:7], " ", "\x00\x01", *LINES[7:20], "\x00", "", ""]
    paths = [
        write_lines(tmp_path / "a.txt", lines),
        write_lines(tmp_path / "empty.txt", ["", "\t"]),
        packed(write_texts(tmp_path / "b.jsonl", [None, *LINES[20:], "", 5]), gzip),
        write_parquet(tmp_path / "c.parquet", [*LINES[:9], "", *LINES[9:12], None]),
    ]
    sources = [file_source(path) for path in paths]
    return BuildRequest(sources, tokens_per_shard=90, skip_bad=True, workers=1)


@pytest.mark.parametrize("after", [(0, 1), (0, 5), (0, 4), (1, 0), (2, 0), (2, 6), (3, 0), (3, 2)])
def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, tokenizer, after):
    request = untidy_request(tmp_path)
    whole = build_corpus(request, tokenizer, tmp_path / "whole")
    assert (whole.total.documents, whole.total.empty_documents, whole.total.bad_rows) == (52, 8, 5)
    interrupt(request, tmp_path / "out", tokenizer, *after)
    interrupt(request, tmp_path / "out", tokenizer, 3, 1)
    left = contents(tmp_path / "out")
    assert "building.jsonl" in left
    assert not any(".tmp" in name for name in left)
    with pytest.raises(DataError, match="was interrupted. Start the same"):
        BuiltCorpus(tmp_path / "out")
    build_corpus(request, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("lines_left", [1, 2, 4])
@pytest.mark.parametrize("torn", [b"", b'{"shard": {"na'])
def test_a_build_killed_between_any_two_writes_goes_on(tmp_path, tokenizer, lines_left, torn):
    request = untidy_request(tmp_path)
    build_corpus(request, tokenizer, tmp_path / "whole")
    interrupt(request, tmp_path / "out", tokenizer, 3, 1)
    progress = tmp_path / "out" / "building.jsonl"
    lines = progress.read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    progress.write_bytes(b"".join(lines[:lines_left]) + torn)
    for name in (".tmp-shard-0123", ".tmp-building.jsonl-0123", ".tmp-manifest.json-0123"):
        (tmp_path / "out" / name).write_bytes(b"half")
    build_corpus(request, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_whole_shards_to_go_on_from(tmp_path, tokenizer, monkeypatch):
    path = write_lines(tmp_path / "a.txt")
    build(tmp_path / "whole", tokenizer, path, tokens_per_shard=100)
    add, room = ShardWriter.add, [6]

    def until_full(writer, *values):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        add(writer, *values)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", until_full)
        with pytest.raises(MachineError, match=r"No space left in .*[1-9] whole shards stay"):
            build(tmp_path / "out", tokenizer, path, tokens_per_shard=100)
    left = contents(tmp_path / "out")
    assert "shard-00000.tokens" in left
    assert not any(".tmp" in name for name in left)
    build(tmp_path / "out", tokenizer, path, tokens_per_shard=100)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.txt")
    request = BuildRequest([file_source(path)], tokens_per_shard=100, workers=1)
    interrupt(request, tmp_path / "out", tokenizer, 0, 5)
    return path


def test_another_build_is_not_mixed_with_an_interrupted_one(tmp_path, tokenizer):
    path = interrupted(tmp_path, tokenizer)
    before = contents(tmp_path / "out")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="tokens_per_shard was 100, and is 50 now"):
        build(out, tokenizer, path, tokens_per_shard=50)
    with pytest.raises(DataError, match="tokenizer was [0-9a-f]{12}, and is [0-9a-f]{12} now"):
        build(out, word_tokenizer(), path, tokens_per_shard=100)
    with pytest.raises(DataError, match="there were 1 sources, and are 2 now"):
        build(out, tokenizer, path, path, tokens_per_shard=100)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"the source a\.txt \(size .* is a\.txt"):
        build(out, tokenizer, path, tokens_per_shard=100)
    assert contents(out) == before


def test_a_finished_corpus_is_not_built_again_nor_over(tmp_path, tokenizer, monkeypatch):
    path = write_lines(tmp_path / "a.txt")
    first = build(tmp_path / "out", tokenizer, path)
    before = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "encoding_in_order", None)
        assert build(tmp_path / "out", tokenizer, path) == first
    with pytest.raises(DataError, match=r"finished corpus of something else \(tokenizer differ"):
        build(tmp_path / "out", word_tokenizer(), path)
    write_lines(path, LINES[1:])
    with pytest.raises(DataError, match=r"something else \(sources differ"):
        build(tmp_path / "out", tokenizer, path)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, tokenizer):
    path = write_lines(tmp_path / "in.txt")
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty \(thesis\.tex\)"):
        build(folder, tokenizer, path)
    with pytest.raises(DataError, match="is a file"):
        build(path, tokenizer, path)
    assert contents(folder) == {"thesis.tex": b"mine"}


def test_two_builds_of_one_folder_do_not_meet(tmp_path, tokenizer):
    from softprompt_dist.data.lm.progress import hold

    path = write_lines(tmp_path / "a.txt")
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out"), pytest.raises(DataError, match="Another process is building"):
        build(tmp_path / "out", tokenizer, path)
    build(tmp_path / "out", tokenizer, path)
