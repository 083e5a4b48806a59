"""Texts to token ids: those of the tokenizer, to which no text is a special piece.

A Hugging Face tokenizer makes the end of a sequence of the characters `</s>`. Here they are
characters as any other, as they are to sentencepiece: what rows hold ends no input.

A tokenizer that cuts at white space before anything else, as T5's does, gives a word the same ids
wherever it stands. Words repeat, so each is encoded once and then looked up.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

WORDS_KEPT = 1 << 19
"""Then all are forgotten; about 80 MB."""
CHARACTERS_KEPT = 1 << 24
"""The same, for text whose words are as long as its sentences, as Chinese is."""
_NO_TEXT, _NO_TEXT_EITHER = "\ufdd0", "\ufdd1"
"""Two characters that Unicode sets apart for a program's own use."""


class EncodedTexts(NamedTuple):
    """The ids of several texts end to end."""

    token_ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    """Ids of each text."""


Encoder = Callable[[Sequence[str]], EncodedTexts]


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker process needs to encode as the tokenizer does; picklable."""

    dtype: str
    """numpy's name of the smallest unsigned type that holds all ids, little-endian."""
    vocabulary_size: int
    """Largest id plus one."""
    backend: str | None
    """The fast tokenizer as JSON, its special pieces out of reach of any text."""
    tokenizer: Any = None
    """The tokenizer itself where it has no fast backend (ByT5)."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> EncoderSpec:
        """The spec of a tokenizer."""
        size = max(tokenizer.get_vocab().values()) + 1
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return cls(
            dtype="<u2" if size <= 1 << 16 else "<u4",
            vocabulary_size=size,
            backend=backend
            and _without_special_pieces(backend.to_str(), special_pieces(tokenizer)),
            tokenizer=tokenizer if backend is None else None,
        )

    @property
    def digest(self) -> str:
        """Hex sha256 of all that the ids of a text depend on, as far as it is known."""
        state = [self.backend, type(self.tokenizer).__name__]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def encoder(self) -> Encoder:
        """A function that encodes; it remembers words and is not to be shared by threads."""
        if self.backend is not None and words_are_independent(self.backend):
            return _WordEncoder(self)
        return self.whole_text_encoder()

    def whole_text_encoder(self) -> _WholeTextEncoder:
        """A function that encodes as well, word by word or not, and remembers nothing."""
        return _WholeTextEncoder(self)

    def load_backend(self) -> Tokenizer:
        """The fast tokenizer, which cuts and pads nothing."""
        from tokenizers import Tokenizer

        assert self.backend is not None
        backend = Tokenizer.from_str(self.backend)
        backend.encode_special_tokens = True
        return backend


_encoders: WeakKeyDictionary[Any, tuple[int, _WholeTextEncoder]] = WeakKeyDictionary()


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, without any special piece; a text may have none."""
    size, encoder = _encoders.get(tokenizer, (None, None))
    if encoder is None or size != len(tokenizer):
        encoder = EncoderSpec.of(tokenizer).whole_text_encoder()
        _encoders[tokenizer] = len(tokenizer), encoder
    return encoder.rows(texts)


def words_are_independent(backend: str) -> bool:
    """Whether the ids of a text are those of its words, cut at spaces, one after another."""
    state = json.loads(backend)
    first, *others = _flat(state["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    return (
        state["model"]["type"] == "Unigram"
        and not state["model"].get("dropout")
        and all(step["type"] == "Precompiled" for step in _flat(state["normalizer"], "normalizers"))
        and first["type"] == "WhitespaceSplit"
        and all(_marks_every_word(step) for step in others)
        and not _has_piece_across_words(backend, state["added_tokens"])
    )


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _marks_every_word(step: dict[str, Any]) -> bool:
    return step["type"] == "Metaspace" and step.get("prepend_scheme") == "always"


def _has_piece_across_words(backend: str, added_tokens: Sequence[dict[str, Any]]) -> bool:
    """Whether an added piece is looked for with a space in it.

    One that is `normalized` is looked for as the normaliser makes it: a line feed, as a space.
    """
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_str(backend).normalizer

    def sought(token: dict[str, Any]) -> str:
        content: str = token["content"]
        return normalizer.normalize_str(content) if token["normalized"] and normalizer else content

    return any(" " in sought(token) for token in added_tokens)


def special_pieces(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All pieces that stand for no text."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(piece.content for piece in added if piece.special)}


def _without_special_pieces(backend: str, special: Collection[str]) -> str:
    """The backend with names for its special pieces that no text has; and it cuts and pads nothing.

    `encode_special_tokens` alone is not enough: it keeps special pieces from being looked for, but
    those of T5 stand in the model's vocabulary as well, as its likeliest pieces.
    """
    state = json.loads(backend) | {"truncation": None, "padding": None, "post_processor": None}
    added, model = state["added_tokens"], state["model"]
    # A single character is needed to write text.
    name_of = {piece: f"{_NO_TEXT}{n}" for n, piece in enumerate(sorted(special)) if len(piece) > 1}
    for token in added:
        if token["content"] in name_of:
            token |= {"content": name_of[token["content"]], "special": True}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[name_of.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {name_of.get(piece, piece): i for piece, i in vocabulary.items()}
    if "merges" in model:
        model["merges"] = [
            m for m in model["merges"] if name_of.keys().isdisjoint([*m, "".join(m)])
        ]
    if "unk_token" in model:
        model["unk_token"] = name_of.get(model["unk_token"], model["unk_token"])
    return json.dumps(state)


class _WholeTextEncoder:
    def __init__(self, spec: EncoderSpec) -> None:
        self._tokenizer, self._dtype = spec.tokenizer, spec.dtype
        self._backend = None if spec.backend is None else spec.load_backend()

    def __call__(self, texts: Sequence[str]) -> EncodedTexts:
        return _joined(self.rows(texts), self._dtype)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self._backend is not None:
            # Who knows the names of special pieces writes none of them either.
            spelt = [text.replace(_NO_TEXT, _NO_TEXT_EITHER) for text in texts]
            encoded = self._backend.encode_batch_fast(spelt, add_special_tokens=False)
            return [one.ids for one in encoded]
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return found


class _WordEncoder:
    """Looks words up; unknown ones, and texts with words that lean on a space, go the usual way."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._encode, self._dtype = spec.whole_text_encoder(), spec.dtype
        self._forget()

    def _forget(self) -> None:
        self._number_of = _Numbering()
        self._num_characters = 0
        self._ids = np.empty(0, dtype=self._dtype)
        self._starts = self._lengths = np.zeros(1, dtype=np.int64)

    def __call__(self, texts: Sequence[str]) -> EncodedTexts:
        if not texts:
            return _joined([], self._dtype)
        if len(self._number_of) > WORDS_KEPT or self._num_characters > CHARACTERS_KEPT:
            self._forget()
        num_words = np.fromiter((text.count(" ") + 1 for text in texts), np.int64, len(texts))
        words = " ".join(texts).split(" ")
        numbers = np.fromiter(map(self._number_of.__getitem__, words), np.int64, len(words))
        self._learn(self._number_of.take_new())
        lengths = self._lengths[numbers]
        if (lengths < 0).any():
            leaning = np.add.reduceat(lengths < 0, np.cumsum(num_words) - num_words) > 0
            return self._encode_apart(texts, leaning)
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        token_ids = self._ids[np.repeat(self._starts[numbers], lengths) + within]
        return EncodedTexts(token_ids, np.diff(ends[np.cumsum(num_words) - 1], prepend=0))

    def _learn(self, words: Sequence[str]) -> None:
        if not words:
            return
        token_ids, lengths = self._encode(words)
        self._num_characters += sum(map(len, words))
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        leans = np.fromiter(map(_leans_on_a_space, words), np.bool_, len(words))
        self._ids = np.concatenate([self._ids, token_ids])
        self._starts = np.concatenate([self._starts, starts])
        self._lengths = np.concatenate([self._lengths, np.where(leans, -1, lengths)])

    def _encode_apart(self, texts: Sequence[str], leaning: npt.NDArray[np.bool_]) -> EncodedTexts:
        whole = self._encode(list(compress(texts, leaning)))
        by_word = self(list(compress(texts, ~leaning)))
        lengths = np.empty(len(texts), dtype=np.int64)
        lengths[leaning], lengths[~leaning] = whole.lengths, by_word.lengths
        is_of_whole = np.repeat(leaning, lengths)
        token_ids = np.empty(len(is_of_whole), dtype=self._dtype)
        token_ids[is_of_whole], token_ids[~is_of_whole] = whole.token_ids, by_word.token_ids
        return EncodedTexts(token_ids, lengths)


class _Numbering(dict[str, int]):
    """Numbers words in the order in which they are first asked for."""

    def __init__(self) -> None:
        super().__init__({"": 0})
        self._new: list[str] = []

    def __missing__(self, word: str) -> int:
        self._new.append(word)
        number = self[word] = len(self)
        return number

    def take_new(self) -> list[str]:
        """Words that were numbered since the last call."""
        new, self._new = self._new, []
        return new


# Normalisation goes by grapheme clusters, and a space forms one with a mark behind it or with a
# prepended sign before it (UAX 29): general categories, and letters and symbols that do it, too.
_MARKS = frozenset({"Mn", "Mc", "Me"})
_UNSURE = frozenset({"Cf", "Cn"})  # of format and not assigned: some join
_JOIN_WHAT_IS_BEFORE = frozenset(
    "\u0e33\u0eb3\uff9e\uff9f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
)
_JOIN_WHAT_IS_BEHIND = frozenset(
    "\u0d4e\U000111c2\U000111c3\U000113d1\U0001193f\U00011941\U00011a3a\U00011d46\U00011f02"
    + "".join(map(chr, range(0x11A84, 0x11A8A)))
)


def _leans_on_a_space(word: str) -> bool:
    first, last = word[0], word[-1]
    if first.isascii() and last.isascii():
        return False
    return (
        unicodedata.category(first) in _MARKS | _UNSURE
        or unicodedata.category(last) in _UNSURE
        or first in _JOIN_WHAT_IS_BEFORE
        or last in _JOIN_WHAT_IS_BEHIND
    )


def _joined(ids: Sequence[Sequence[int]], dtype: str) -> EncodedTexts:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    token_ids = np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum()))
    return EncodedTexts(token_ids, lengths)
