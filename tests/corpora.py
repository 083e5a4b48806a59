"""Small texts and tokenizers for the tests of corpora."""

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import softprompt_dist
from softprompt_dist.data.lm import text_sources
from softprompt_dist.data.lm.build import BuildRequest, build_corpus
from softprompt_dist.data.lm.text_sources import file_source
from tests import runs

TINY_T5 = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"
LINES = [
    f"Line {n}: the river was {n * 7} feet wide" + ", and cold" * (n % 5) + "." for n in range(40)
]


def tiny_t5():
    return AutoTokenizer.from_pretrained(TINY_T5, local_files_only=True)


def word_tokenizer(num_words=100):
    """Knows the words w0, w1, ..."""
    vocabulary = {"<unk>": 0} | {f"w{n}": n + 1 for n in range(num_words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def write_lines(path, lines=LINES):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_texts(path, texts, field="text"):
    """A jsonl file, whatever the texts are."""
    return runs.write_rows(path, ({"id": 1, field: text} for text in texts))


def write_parquet(path, values, field="text"):
    datasets.Dataset.from_dict({"id": list(range(len(values))), field: values}).to_parquet(path)
    return path


def packed(path, pack=gzip):
    """A compressed copy of a file beside it."""
    target = path.with_name(f"{path.name}{'.gz' if pack is gzip else '.xz'}")
    target.write_bytes(pack.compress(path.read_bytes()))
    return target


def read_in_small_batches(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    """Small texts, too, take several; and what `datasets` makes of files goes into a folder."""
    monkeypatch.setattr(text_sources, "BATCH_BYTES", 200)
    monkeypatch.setattr(text_sources, "_ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub_cache)


def build(folder, tokenizer, *paths, **settings):
    """The manifest of a corpus of files, built in this process."""
    sources = [file_source(path, settings.get("field_name", "text")) for path in paths]
    return build_corpus(BuildRequest(sources, **{"workers": 1} | settings), tokenizer, folder)


def documents_in(source):
    """The ids of each document."""
    offsets = source.offsets(0, source.num_documents).tolist()
    assert (offsets[0], offsets[-1]) == (0, source.num_tokens)
    return [
        source.tokens(start, end).tolist()
        for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]


def ids_of(tokenizer, texts):
    """What the tokenizer itself makes of each text."""
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def contents(folder):
    """Bytes of all files below the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
