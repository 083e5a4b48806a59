"""What an objective needs to know of a corpus, wherever its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int64]


class TokenSource(Protocol):
    """The token ids of all documents end to end, without any end-of-sequence."""

    @property
    def num_tokens(self) -> int:
        """Of all documents."""

    @property
    def num_documents(self) -> int:
        """Empty ones are none."""

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, their order and the tokenizer."""

    def tokens(self, first: int, last: int) -> IdArray:
        """token_ids[first:last], a copy."""

    def offsets(self, first: int, last: int) -> IdArray:
        """Where documents `first` to `last` (exclusive) begin, and where the last of them ends.

        Document d is `tokens(o[d], o[d + 1])` with o = offsets(0, num_documents).
        """


@dataclass(frozen=True)
class TokensInMemory:
    """A small corpus."""

    token_ids: IdArray
    """Of all documents."""
    document_offsets: IdArray
    """One more than there are documents; the first is 0."""
    fingerprint: str = "in memory"

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return len(self.token_ids)

    @property
    def num_documents(self) -> int:
        """How many."""
        return len(self.document_offsets) - 1

    def tokens(self, first: int, last: int) -> IdArray:
        """token_ids[first:last], a copy."""
        return self.token_ids[first:last].astype(np.int64)

    def offsets(self, first: int, last: int) -> IdArray:
        """Where documents `first` to `last` (exclusive) begin, and where the last of them ends."""
        return self.document_offsets[first : last + 1].astype(np.int64)
