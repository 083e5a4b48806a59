"""Small texts and tokenizers for the tests of corpora."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import softprompt_dist
from softprompt_dist.data.lm.build import BuildRequest, build_corpus
from softprompt_dist.data.lm.text_sources import file_source

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
