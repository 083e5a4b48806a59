"""What an answer's tokens say, before anybody judges it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softprompt_dist.data.detokenise import detokenise

PIECES = ["<pad>", "</s>", "<unk>", "▁Hello", "▁'", "▁s", "▁n't", "▁.", "lo", "▁"]
PAD, END, UNKNOWN, HELLO, QUOTE, S, NOT, STOP, LO, SPACE = range(10)
SENTINEL = 10


def make_tokenizer(*, unknown: str | None = "<unk>", pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """As T5's: pieces with their space in front, one sentinel, and spaces cleaned up by default."""
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token="</s>",
        unk_token=unknown,
        clean_up_tokenization_spaces=True,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>"]})
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == SENTINEL
    return tokenizer


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([HELLO, END, S], "Hello"),
        ([END], ""),
        ([], ""),
        ([PAD, HELLO, PAD, LO], "Hellolo"),
        ([HELLO, QUOTE, S, STOP], "Hello ' s ."),
        ([HELLO, NOT], "Hello n't"),
        ([HELLO, UNKNOWN, LO], "Hello ⁇ lo"),
        ([UNKNOWN, HELLO], " ⁇  Hello"),
        ([HELLO, 11, 99], "Hello ⁇  ⁇ "),
        ([SENTINEL, HELLO], "<extra_id_0> Hello"),
    ],
)
def test_an_answer_is_what_sentencepiece_decodes(ids: list[int], text: str) -> None:
    assert detokenise([ids], make_tokenizer()) == [text]


def test_rows_are_read_one_by_one() -> None:
    assert detokenise([[HELLO, END], [S, S]], make_tokenizer()) == ["Hello", "s s"]


def test_no_rows_are_no_texts() -> None:
    assert detokenise([], make_tokenizer()) == []


def test_without_an_unknown_piece_an_id_beyond_the_vocabulary_says_nothing() -> None:
    assert detokenise([[HELLO, 99]], make_tokenizer(unknown=None)) == ["Hello"]


def test_a_tokenizer_that_pads_with_the_end_loses_nothing() -> None:
    assert detokenise([[HELLO, S, END, END]], make_tokenizer(pad="</s>")) == ["Hello s"]


def test_no_rows_no_texts() -> None:
    assert detokenise([], make_tokenizer()) == []
