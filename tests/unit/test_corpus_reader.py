"""Built corpora and text files as one source: the right tokens anywhere, and damage found."""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import normalizers

from softprompt_dist.data.batching import tokenizer_fingerprint
from softprompt_dist.data.lm.corpus import (
    BuiltCorpus,
    built_corpora,
    open_corpus,
    parse_repeats,
    part_name,
)
from softprompt_dist.errors import DataError
from tests.corpora import (
    LINES,
    build,
    contents,
    documents_in,
    ids_of,
    word_tokenizer,
    write_lines,
)
from tests.lm_corpora import corpus_of


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("corpus")
    build(folder / "corpus", tokenizer, write_lines(folder / "a.txt"), tokens_per_shard=100)
    return folder / "corpus"


@pytest.fixture
def damaged(built, tmp_path):
    return shutil.copytree(built, tmp_path / "damaged")


def test_any_stretch_is_what_it_would_be_corpus_of(built, tokenizer, tmp_path):
    other = write_lines(tmp_path / "b.txt", LINES[3:9])
    source = open_corpus([f"{built}*2", str(other)], tokenizer, tmp_path / "cache")
    expected = corpus_of(ids_of(tokenizer, [*LINES, *LINES, *LINES[3:9]]))
    assert (source.num_tokens, source.num_documents) == (
        expected.num_tokens,
        expected.num_documents,
    )
    for first in range(0, source.num_tokens + 1, 31):
        for length in (0, 1, 40, 100, 101, 250, source.num_tokens):
            found = source.tokens(first, first + length)
            assert found.dtype == np.int64
            assert found.tolist() == expected.tokens(first, first + length).tolist()
    for first in range(source.num_documents + 1):
        for length in (0, 1, 2, 9, 40, source.num_documents):
            found = source.offsets(first, first + length)
            assert found.dtype == np.int64
            assert found.tolist() == expected.offsets(first, first + length).tolist()


def test_what_is_read_is_a_copy(built):
    corpus = BuiltCorpus(built)
    before = contents(built)
    corpus.tokens(0, 10)[:] = 0
    corpus.offsets(0, 3)[:] = 0
    assert documents_in(corpus) == documents_in(BuiltCorpus(built))
    assert contents(built) == before


def test_shards_are_mapped_without_a_descriptor_each(tmp_path):
    import os

    tokenizer = word_tokenizer()
    lines = [f"w{n % 100}" for n in range(60)]
    build(tmp_path / "out", tokenizer, write_lines(tmp_path / "a", lines), tokens_per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    corpus = BuiltCorpus(tmp_path / "out")
    assert len(documents_in(corpus)) == len(corpus.manifest.shards) == 60
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_a_corpus_goes_to_another_process_by_its_name(built):
    corpus = BuiltCorpus(built)
    documents_in(corpus)
    content = pickle.dumps(corpus)
    assert documents_in(pickle.loads(content)) == documents_in(corpus)
    assert len(content) < len(pickle.dumps(BuiltCorpus(built))) + 100


def test_repeats_are_parsed():
    assert parse_repeats("a/b.txt*12") == parse_repeats("a/b.txt*12")
    assert [str(parse_repeats("a/b*12")[0]), parse_repeats("a/b*12")[1]] == ["a/b", 12]
    assert parse_repeats("a")[1] == parse_repeats("a*0")[1] == 1


def test_the_fingerprint_is_that_of_content_order_and_repeats(built, tokenizer, tmp_path):
    text = write_lines(tmp_path / "b.txt", LINES[:5])

    def fingerprint(*specs):
        return open_corpus([str(spec) for spec in specs], tokenizer, tmp_path / "cache").fingerprint

    different = [(built,), (text,), (built, text), (text, built), (f"{built}*2",)]
    assert len({fingerprint(*specs) for specs in different}) == len(different)
    assert fingerprint(built, built) == fingerprint(f"{built}*2")
    shutil.copytree(built, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == fingerprint(built)


def test_a_text_file_is_tokenised_once(tmp_path, tokenizer, monkeypatch):
    text = write_lines(tmp_path / "a.txt")
    first = open_corpus([str(text)], tokenizer, tmp_path / "cache")
    assert documents_in(first) == ids_of(tokenizer, LINES)
    monkeypatch.setattr("softprompt_dist.data.lm.corpus.build_corpus", None)
    moved = shutil.copy(text, tmp_path / "moved.txt")
    assert open_corpus([str(moved)], tokenizer, tmp_path / "cache").fingerprint == first.fingerprint
    write_lines(text, LINES[:3])
    with pytest.raises(TypeError):  # of what was taken away above
        open_corpus([str(text)], tokenizer, tmp_path / "cache")


def test_another_tokenizer_has_a_cache_of_its_own(tmp_path, tokenizer):
    text = write_lines(tmp_path / "a.txt", ["w1 w2", "w3"])
    words = word_tokenizer()
    for one in (tokenizer, words, tokenizer):
        source = open_corpus([str(text)], one, tmp_path / "cache")
        assert documents_in(source) == ids_of(one, ["w1 w2", "w3"])


def test_processes_that_start_together_build_one_cache(tmp_path, tokenizer):
    text = write_lines(tmp_path / "a.txt")
    with ThreadPoolExecutor(4) as pool:
        sources = list(
            pool.map(lambda _: open_corpus([str(text)], tokenizer, tmp_path / "cache"), range(4))
        )
    assert all(documents_in(source) == ids_of(tokenizer, LINES) for source in sources)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_without_locks_whoever_comes_second_takes_what_is_there(tmp_path, tokenizer, monkeypatch):
    from softprompt_dist.data.lm import corpus as module

    text = write_lines(tmp_path / "a.txt")
    build_corpus = module.build_corpus

    def overtaken(request, tokenizer, folder):
        monkeypatch.setattr(module, "build_corpus", build_corpus)
        name = folder.name.split("-")[1]
        build_corpus(request, tokenizer, folder.with_name(name))
        return build_corpus(request, tokenizer, folder)

    monkeypatch.setattr(module, "build_corpus", overtaken)
    source = open_corpus([str(text)], tokenizer, tmp_path / "cache")
    assert documents_in(source) == ids_of(tokenizer, LINES)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer, caplog):
    text = write_lines(tmp_path / "a.txt")
    open_corpus([str(text)], tokenizer, tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").glob("*/shard-00000.tokens")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    source = open_corpus([str(text)], tokenizer, tmp_path / "cache")
    assert documents_in(source) == ids_of(tokenizer, LINES)
    assert "damaged" in caplog.text


def test_a_shard_cut_off_is_refused_at_once(damaged):
    path = damaged / "shard-00001.tokens"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=rf"00001\.tokens has {size - 1} bytes.*says {size}: it was"
    ):
        BuiltCorpus(damaged)


def test_a_missing_shard_is_refused_at_once(damaged):
    (damaged / "shard-00002.offsets").unlink()
    with pytest.raises(DataError, match=r"shard-00002\.offsets is missing\. Copy"):
        BuiltCorpus(damaged)


@pytest.mark.parametrize("name", ["shard-00001.tokens", "shard-00000.offsets"])
def test_a_flipped_bit_is_found_by_the_checksum(damaged, tokenizer, tmp_path, name):
    content = bytearray((damaged / name).read_bytes())
    content[5] ^= 4
    (damaged / name).write_bytes(content)
    BuiltCorpus(damaged)
    with pytest.raises(DataError, match=rf"{name} has sha256 [0-9a-f]{{12}}.*it was changed"):
        open_corpus([str(damaged)], tokenizer, tmp_path, verify=True)
    open_corpus([str(damaged)], tokenizer, tmp_path)


EDITS = {
    "a checksum": (lambda m: m["shards"][0].update(tokens_sha256="0" * 64), "it was edited"),
    "the tokenizer": (lambda m: m["tokenizer"].update(fingerprint="0"), "it was edited"),
    "a count": (lambda m: m["total"].update(tokens=5), r"says 5 tokens, and its shards have"),
    "a version": (lambda m: m.update(version=2), "has version 2, and this release reads 1"),
    "no shards": (lambda m: m.pop("shards"), r"is damaged \(shards: Field required"),
    "a type": (lambda m: m["total"].update(tokens="many"), r"is damaged \(total\.tokens"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_refused(damaged, edit, message):
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        BuiltCorpus(damaged)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_manifest_that_is_none_is_refused(damaged, content):
    (damaged / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        BuiltCorpus(damaged)


def test_another_tokenizer_is_refused(built, tokenizer, tmp_path):
    other = word_tokenizer()
    short = [tokenizer_fingerprint(one)[:12] for one in (tokenizer, other)]
    with pytest.raises(DataError, match=rf"tiny-t5 .*{short[0]}.*{short[1]}.*set `tokenizer`"):
        open_corpus([str(built)], other, tmp_path)


def test_a_tokenizer_that_reads_the_same_pieces_otherwise_is_refused(built, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    backend = other.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    with pytest.raises(DataError, match=r"this run's \(ids_of_probe \w{12} there, \w{12} here"):
        open_corpus([str(built)], other, tmp_path)


def test_a_manifest_of_another_release_is_read(built, damaged, tokenizer, tmp_path):
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["tokenizer"]["ids_of_probe"]  # that of 0.1.0 has none
    manifest["tokenizer"]["of_a_later_release"] = manifest["of_a_later_release"] = 1
    path.write_text(json.dumps(manifest))
    read = open_corpus([str(damaged)], tokenizer, tmp_path)
    assert read.num_tokens == open_corpus([str(built)], tokenizer, tmp_path).num_tokens > 0


def test_what_is_no_corpus_is_refused(tmp_path, tokenizer):
    for spec, message in {
        tmp_path: "is no corpus: it has no manifest",
        tmp_path / "absent": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            open_corpus([str(spec)], tokenizer, tmp_path)
    blank = write_lines(tmp_path / "blank.txt", ["", " "])
    with pytest.raises(DataError, match=r"no text in blank\.txt"):
        open_corpus([str(blank)], tokenizer, tmp_path / "cache")
    with pytest.raises(DataError, match="No corpus is given"):
        open_corpus([], tokenizer, tmp_path)


def test_parts_are_one_corpus_when_all_are_there(tmp_path, tokenizer):
    for part in (1, 3):
        path = write_lines(tmp_path / f"{part}.txt", LINES[part - 1 :: 3])
        build(tmp_path / "out" / part_name(part, 3), tokenizer, path, part=f"{part}/3")
    with pytest.raises(DataError, match=r"lacks part-00002-of-00003 of 3\. Build"):
        open_corpus([str(tmp_path / "out")], tokenizer, tmp_path)
    path = write_lines(tmp_path / "2.txt", LINES[1::3])
    build(tmp_path / "out" / part_name(2, 3), tokenizer, path, part="2/3")
    source = open_corpus([str(tmp_path / "out")], tokenizer, tmp_path)
    assert documents_in(source) == ids_of(tokenizer, LINES[0::3] + LINES[1::3] + LINES[2::3])
    (tmp_path / "out" / part_name(1, 2)).mkdir()
    with pytest.raises(DataError, match="of 2 and of 3 parts"):
        built_corpora(tmp_path / "out")
