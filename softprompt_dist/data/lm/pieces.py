"""Three ways to cut a corpus into the stretches of text that become examples.

- prefix LM: each document on its own, as T5's `split_tokens_to_inputs_length`; never joined.
- span corruption: all documents end to end with nothing between them, as `reduce_concat_tokens`.
- `lm` and complementary pairs: the same with end-of-sequence behind every document, as `full_lm`.

T5 first reduces a document of more than 65,536 tokens to one random chunk of that length
(`select_random_chunk`). That is left out on purpose: all text is used.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from softprompt_dist.data.lm.document_index import DocumentIndex
from softprompt_dist.data.lm.token_source import IdArray, TokenSource


class Stretches(NamedTuple):
    """Where E pieces lie in the text; int64 [E] each."""

    starts: IdArray
    lengths: IdArray


class DocumentPieces:
    """Each document cut on its own into pieces of `piece_length` tokens, the last one shorter."""

    def __init__(self, source: TokenSource, piece_length: int) -> None:
        """Count the pieces of all documents."""
        self._piece_length = piece_length
        self._index = DocumentIndex(source, lambda lengths: -(-lengths // piece_length))

    def __len__(self) -> int:
        """Number of pieces."""
        return self._index.num_units

    def stretches(self, indices_E: IdArray) -> Stretches:
        """Where pieces lie among the tokens of the source."""
        located = self._index.locate(indices_E)
        starts_E = located.token_starts + located.within * self._piece_length
        return Stretches(starts_E, np.minimum(self._piece_length, located.token_ends - starts_E))


class EqualPieces:
    """Running text cut into pieces of `piece_length` tokens; what is left at the end is dropped."""

    def __init__(self, num_tokens: int, piece_length: int) -> None:
        """Cut `num_tokens` of text."""
        self._num_pieces = num_tokens // piece_length
        self._piece_length = piece_length

    def __len__(self) -> int:
        """Number of pieces."""
        return self._num_pieces

    def stretches(self, indices_E: IdArray) -> Stretches:
        """Where pieces lie in the text."""
        return Stretches(
            indices_E * self._piece_length, np.full_like(indices_E, self._piece_length)
        )


class RunningText:
    """All documents end to end, end-of-sequence behind each."""

    def __init__(self, source: TokenSource, eos_id: int) -> None:
        """Number the positions of all documents."""
        self._source = source
        self._eos_id = eos_id
        self._index = DocumentIndex(source, lambda lengths: lengths + 1)

    @property
    def num_tokens(self) -> int:
        """Every end-of-sequence counted."""
        return self._index.num_units

    def read(self, starts_E: IdArray, length: int) -> IdArray:
        """The text from each start on: [E, length]."""
        located = self._index.locate(np.concatenate([starts_E, starts_E + (length - 1)]))
        firsts, lasts = located.documents.reshape(2, -1).tolist()
        ids_EL = np.full((len(starts_E), length), self._eos_id, dtype=np.int64)
        for ids, start, first, last in zip(ids_EL, starts_E.tolist(), firsts, lasts, strict=True):
            document_ends = self._source.offsets(first, last + 1)[1:]
            # `first` times end-of-sequence came before this stretch.
            eos_places = document_ends + np.arange(first, last + 1) - start
            is_text = np.ones(length, dtype=np.bool_)
            is_text[eos_places[eos_places < length]] = False
            begin = start - first
            ids[is_text] = self._source.tokens(begin, begin + int(is_text.sum()))
        return ids_EL
