"""Ids are those of the tokenizer itself, whatever the text and however they are found."""

import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softprompt_dist.data import encoding
from softprompt_dist.data.demo_corpus import train_tokenizer
from softprompt_dist.data.encoding import EncoderSpec, encode_texts, words_are_independent
from tests.corpora import LINES, ids_of, tiny_t5, word_tokenizer, write_lines

AWKWARD = [
    "",
    " ",
    "  two  spaces   three ",
    "tab\tand\nnew line\r\nand\u00a0no-break\u3000ideographic\u2009thin",
    "a \u0301accent on a space and one\u0301 on a letter \u0301",
    "zero\u200bwidth \u200djoined \u200c apart \ufeff mark",
    "¨ ´ ﷺ ﬁ ½ ｶ ﾞ ² №",
    "«quoted» “curly” ‘single’ – — … €",
    "less < than, more > than, </ and />",
    "▁ meta ▁space▁ ",
    "नमस्ते दुनिया का पाठ",
    "สวัสดี ำ ชาวโลก",
    "مرحبا \u0600 بالعالم \u06dd",
    "👍🏽 🏽 👨‍👩‍👧 🇩🇪 🇫 🇷",
    "漢字とかな 한국어 각",
    "\x01 control \x1f and \x85 next line \u2028 separator",
]


def encoded(spec, texts):
    token_ids, lengths = spec.encoder()(texts)
    assert token_ids.dtype == spec.dtype
    ends = np.cumsum(lengths)
    return [
        token_ids[end - length : end].tolist() for length, end in zip(lengths, ends, strict=True)
    ]


def test_awkward_texts_have_the_tokenizer_s_ids(tokenizer):
    spec = EncoderSpec.of(tokenizer)
    assert words_are_independent(spec.backend)
    assert encoded(spec, AWKWARD) == ids_of(tokenizer, AWKWARD)
    assert [encoded(spec, [text])[0] for text in AWKWARD] == ids_of(tokenizer, AWKWARD)


SPECIAL = ["</s>", "in</s>side", "<pad>x", "<unk> <extra_id_0>is<extra_id_99>", "</s></s>", "<s>"]
HIDDEN = [f"the \ufdd0{n}" for n in range(12)]
"""What special pieces are called while texts are encoded."""


def test_special_pieces_in_a_text_are_text_as_in_sentencepiece(tmp_path):
    train_tokenizer(
        [write_lines(tmp_path / "text", [*LINES, "<>/_ spaunkdextr_id"])], tmp_path, 160
    )
    spm = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    texts = [
        *SPECIAL,
        *HIDDEN,
        *(line.replace(" the ", special) for line in LINES for special in SPECIAL),
    ]
    expected = [spm.encode(text) for text in texts]
    for name in ("spiece.model", "tokenizer.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        shutil.copy(tmp_path / name, folder)
        (folder / "config.json").write_text('{"model_type": "t5"}')
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert 1 in tokenizer(SPECIAL[0], add_special_tokens=False).input_ids
        assert encoded(EncoderSpec.of(tokenizer), texts) == expected
        assert encode_texts(texts, tokenizer) == expected


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_chat_model_s_special_pieces_are_text_and_other_added_ones_pieces(ignore_merges):
    """Some that merges lead to or not, one that is not flagged, and one of a single character."""
    backend = byte_level_bpe(["<|im_end|> ok <eos>", *LINES])
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()))
    assert "end" in plain.get_vocab()
    backend.model.ignore_merges = ignore_merges
    special = ["<|im_end|>", "end", "<|pad|>", "\u20ac"]
    backend.add_special_tokens(special)
    backend.add_tokens(["<think>"])
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    texts = ["the <|im_end|><|im_end|> end", "end", " end", "<|pad|>", "5 \u20ac", *LINES]
    found = encode_texts(texts, chat)
    assert plain.batch_decode(found) == texts
    assert not {i for ids in found for i in ids} & set(chat.convert_tokens_to_ids(special))
    assert encode_texts(LINES, chat) == ids_of(plain, LINES)
    assert encode_texts(["a<think>"], chat) == [
        [*ids_of(plain, ["a"])[0], chat.convert_tokens_to_ids("<think>")]
    ]


def byte_level_bpe(texts):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts * 2, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def test_characters_beside_spaces_have_the_tokenizer_s_ids(tokenizer):
    """All marks, format characters and such as lean on a space, and every seventh other one."""
    assigned = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    leaning = [c for c in assigned if unicodedata.category(c)[0] in "MCZS"]
    texts = [f"a {c} b{c} {c}c" for c in {*leaning[::3], *assigned[::97]}]
    assert encoded(EncoderSpec.of(tokenizer), texts) == ids_of(tokenizer, texts)


def test_words_that_were_forgotten_are_learnt_again(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "WORDS_KEPT", 10)
    encode = EncoderSpec.of(tokenizer).encoder()
    for start in range(0, len(LINES), 4):
        batch = LINES[start : start + 4]
        expected = [i for ids in ids_of(tokenizer, batch) for i in ids]
        assert encode(batch).token_ids.tolist() == expected


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
            )
        },
        {"normalizer": normalizers.Replace("r w", "_")},
    ],
    ids=["metaspace", "first word", "across words"],
)
def test_rules_that_look_beyond_a_word_are_kept(change):
    other = tiny_t5()
    for name, value in change.items():
        setattr(other.backend_tokenizer, name, value)
    spec = EncoderSpec.of(other)
    assert not words_are_independent(spec.backend)
    assert encoded(spec, [*LINES, *AWKWARD]) == ids_of(other, [*LINES, *AWKWARD])
    assert spec.digest != EncoderSpec.of(tiny_t5()).digest


def test_a_piece_with_a_space_in_it_is_found():
    other = tiny_t5()
    other.add_tokens(["river was"])
    spec = EncoderSpec.of(other)
    assert encoded(spec, LINES) == ids_of(other, LINES)
    assert len(encoded(spec, LINES)[0]) < len(ids_of(tiny_t5(), LINES)[0])


@pytest.mark.parametrize("piece", ["\n", "▁", "▁wide,"])
def test_a_piece_that_is_looked_for_with_a_space_is_found(piece):
    """T5's normaliser makes a space of a line feed and of the sign that stands for one."""
    other = tiny_t5()
    other.add_tokens([piece])
    spec = EncoderSpec.of(other)
    assert encoded(spec, [*LINES, *AWKWARD]) == ids_of(other, [*LINES, *AWKWARD])
    assert encoded(spec, LINES) != ids_of(tiny_t5(), LINES)


def test_words_as_long_as_documents_do_not_fill_the_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "CHARACTERS_KEPT", 5_000)
    encode = EncoderSpec.of(tokenizer).encoder()
    for number in range(20):
        text = f"{number}漢字" * 500
        assert encode([text]).token_ids.tolist() == ids_of(tokenizer, [text])[0]
    assert len(encode._number_of) < 10


def test_what_was_cut_and_padded_before_changes_nothing(tokenizer):
    used = tiny_t5()
    used(["a", "a much longer text than four pieces"], padding=True, truncation=True, max_length=4)
    assert EncoderSpec.of(used).digest == EncoderSpec.of(tokenizer).digest
    assert encoded(EncoderSpec.of(used), LINES) == ids_of(tokenizer, LINES)


def test_another_process_gets_the_same(tokenizer):
    other = word_tokenizer(70_000)
    spec = pickle.loads(pickle.dumps(EncoderSpec.of(other)))
    assert (spec.dtype, spec.vocabulary_size) == ("<u4", 70_001)
    assert encoded(spec, ["w69999 w3", "w70000"]) == [[70_000, 4], [0]]
    assert EncoderSpec.of(tokenizer).dtype == "<u2"
    assert EncoderSpec.of(word_tokenizer(65_535)).dtype == "<u2"


def test_a_tokenizer_without_a_fast_backend_is_asked_itself():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    assert encoded(EncoderSpec.of(slow), ["", "é b"]) == ids_of(slow, ["", "é b"])
    assert encode_texts(["</s>"], slow) == [[byte + 3 for byte in b"</s>"]]
