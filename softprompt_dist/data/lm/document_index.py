"""Which document holds the n-th piece, or the n-th position, of hundreds of millions of them.

Documents lie one after the other on a line, each taking some number of units (pieces, positions).
Where each block of documents begins is kept in memory; where the documents of a block begin is
worked out from their offsets when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from softprompt_dist.data.lm.token_source import IdArray, TokenSource
from softprompt_dist.errors import DataError

DOCUMENTS_PER_BLOCK = 256  # 12 MB of block starts for the 365 million documents of C4
BLOCKS_AT_A_TIME = 4096


class Located(NamedTuple):
    """For each of E units: its document, its place in there, and where the document's tokens are.

    int64 [E] each.
    """

    documents: IdArray
    within: IdArray
    token_starts: IdArray
    token_ends: IdArray


class DocumentIndex:
    """Finds documents by unit; reads all offsets once, in chunks, to begin with."""

    def __init__(self, source: TokenSource, units_of: Callable[[IdArray], IdArray]) -> None:
        """`units_of` tells how many units documents of given lengths (in tokens) take."""
        self._source = source
        self._units_of = units_of
        sums = [np.zeros(1, dtype=np.int64)]
        step = DOCUMENTS_PER_BLOCK * BLOCKS_AT_A_TIME
        for first in range(0, source.num_documents, step):
            offsets = source.offsets(first, min(first + step, source.num_documents))
            _check(offsets, source.num_tokens)
            units = units_of(np.diff(offsets))
            sums.append(np.add.reduceat(units, np.arange(0, len(units), DOCUMENTS_PER_BLOCK)))
        self._block_starts = np.cumsum(np.concatenate(sums))

    @property
    def num_units(self) -> int:
        """Of all documents."""
        return int(self._block_starts[-1])

    def locate(self, units_E: npt.NDArray[np.int64]) -> Located:
        """The documents that hold these units, each in [0, num_units)."""
        blocks_E = np.searchsorted(self._block_starts, units_E, side="right") - 1
        blocks_U = np.unique(blocks_E)
        offsets_UD = self._offsets(blocks_U)
        sizes_UD = self._units_of(np.diff(offsets_UD, axis=1))
        starts_UD = self._block_starts[blocks_U, None] + np.cumsum(sizes_UD, axis=1) - sizes_UD
        # Blocks ascend, so all starts do. Documents of no unit share their start with the next
        # one; the last of equal starts is the one that holds something.
        found_E = np.searchsorted(starts_UD.reshape(-1), units_E, side="right") - 1
        rows_E, columns_E = np.divmod(found_E, DOCUMENTS_PER_BLOCK)
        return Located(
            blocks_U[rows_E] * DOCUMENTS_PER_BLOCK + columns_E,
            units_E - starts_UD[rows_E, columns_E],
            offsets_UD[rows_E, columns_E],
            offsets_UD[rows_E, columns_E + 1],
        )

    def _offsets(self, blocks_U: IdArray) -> IdArray:
        """Offsets of the documents of each block; those behind the last document are empty."""
        offsets_UD = np.empty((len(blocks_U), DOCUMENTS_PER_BLOCK + 1), dtype=np.int64)
        for row, block in zip(offsets_UD, blocks_U.tolist(), strict=True):
            first = block * DOCUMENTS_PER_BLOCK
            last = min(first + DOCUMENTS_PER_BLOCK, self._source.num_documents)
            offsets = self._source.offsets(first, last)
            row[: len(offsets)] = offsets
            row[len(offsets) :] = offsets[-1]
        return offsets_UD


def _check(offsets: IdArray, num_tokens: int) -> None:
    """They come from a file, whose checksum not every run compares."""
    if offsets[0] < 0 or offsets[-1] > num_tokens or (np.diff(offsets) < 0).any():
        raise DataError(
            "The offsets of a corpus run backwards, or beyond its tokens: it is damaged. Compare "
            "its checksums (verify_corpus: true), then copy it again or build it anew."
        )
