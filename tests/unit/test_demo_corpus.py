import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import softprompt_dist
from softprompt_dist.data import demo_corpus
from softprompt_dist.errors import DataError

ASSETS = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"
RIVER = (
    "09411430 17 n 02 river 0 water_course 0 003 @ 09448361 n 0000 ~ 09189157 n 0000 "
    "%p 09389211 n 0000 | a large natural stream of water; also salt  \n"
)
ADJECTIVE = "00001740 00 a 01 able(p) 0 001 = 05200169 n 0000 | having the necessary means  \n"


def test_wordnet_lines_become_sentences_and_questions(tmp_path):
    path = tmp_path / "data.noun"
    path.write_text("  1 This software is provided under licence | of some kind here\n" + RIVER)
    assert list(demo_corpus.wordnet_glosses(path)) == [
        "river, water course (natural object): a large natural stream of water; also salt"
    ]
    assert list(demo_corpus.wordnet_questions(path)) == [
        "What is river ? natural object : a large natural stream of water"
    ]
    path.write_text(ADJECTIVE)
    assert list(demo_corpus.wordnet_glosses(path)) == ["able: having the necessary means"]


def test_a_thesaurus_becomes_a_line_a_word(tmp_path):
    path = tmp_path / "th_en_US_v2.dat"
    path.write_text(
        "UTF-8\ntedious|2\n(adj)|boring|Tedious|dull (similar term)\n(adj)|wordy\n"
        "ten|1\n(noun)|10\n"
    )
    assert list(demo_corpus.thesaurus_entries(path)) == ["tedious: boring, dull; wordy", "ten: 10"]


def test_snippets_of_held_out_splits_never_reach_the_corpus(tmp_path):
    texts = [f"The film number {i} was long." for i in range(100)]
    for name in demo_corpus.VADER_FILES.values():
        lines = [f"{i}\t-0.5\t{text}" for i, text in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(lines))
    test_set = tmp_path / "test.jsonl.gz"
    test_set.write_bytes(
        gzip.compress(json.dumps({"text": "the film number 7 was long ."}).encode())
    )
    out = tmp_path / "out"
    demo_corpus.main(["--out", str(out), "--vader", str(tmp_path), "--held-out", str(test_set)])
    written = {
        line
        for path in out.iterdir()
        for line in path.read_text().splitlines()
    }  # fmt: skip
    held_out = {
        text
        for text in texts
        if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10 in (0, 1)
    }
    assert held_out
    assert written == set(texts) - held_out - {texts[7]}


def test_markup_and_code_are_dropped():
    assert list(
        demo_corpus.html_paragraphs("<p>" + "Word &amp; <b>word</b> " * 6 + "</p><p>x</p>")
    ) == [("Word & word " * 6).strip()]
    text = (
        "int main(void) { return 0; } /* 12 34 56 78 90 12 34 56 78 90 12 34 */\n\n"
        + "Plain prose. " * 8
    )
    assert list(demo_corpus.paragraphs(text)) == [("Plain prose. " * 8).strip()]


def test_novels_become_pages(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text(
        "\n".join("A paragraph of some fifty characters, more or less." for _ in range(100))
    )
    pages = list(demo_corpus.novel_documents(path))
    assert len(pages) == 3
    assert all(len(page) < 4000 for page in pages)


def test_a_build_without_sources_is_refused(tmp_path):
    with pytest.raises(DataError, match="No source"):
        demo_corpus.main(["--out", str(tmp_path)])


def test_the_packaged_tokenizer_has_the_ids_of_t5():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS, local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 6144
    names = [f"<extra_id_{i}>" for i in range(100)]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(6143, 6043, -1))
    text = "What films featured the river?"
    ids = tokenizer(text).input_ids
    assert ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_texts_may_be_packed(tmp_path, suffix, opener):
    path = tmp_path / f"texts.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write('{"text": " café "}\n{"text": "second"}\n')
    assert list(demo_corpus.json_texts(path)) == ["café", "second"]
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        demo_corpus.open_text(tmp_path / "absent.txt")
