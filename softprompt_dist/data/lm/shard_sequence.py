"""Documents to shards: each ends with the first document that fills it, and is then taken down."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softprompt_dist.data.lm.encoding_pool import EncodedRows
from softprompt_dist.data.lm.manifest import Counts, ShardRecord
from softprompt_dist.data.lm.progress import Cursor, Progress, ProgressFile
from softprompt_dist.data.lm.shards import ShardWriter
from softprompt_dist.data.lm.token_source import IdArray

log = logging.getLogger(__name__)


class ShardSequence:
    """The shards of a build, the one being written included."""

    def __init__(
        self,
        folder: Path,
        token_dtype: str,
        tokens_per_shard: int,
        done: Progress,
        progress: ProgressFile,
    ) -> None:
        self.records: list[ShardRecord] = list(done.shards)
        self._folder, self._token_dtype = folder, token_dtype
        self._tokens_per_shard = tokens_per_shard
        self._progress = progress
        self._cursor = done.cursor
        self._open: ShardWriter | None = None
        self._num_bytes = self._num_empty = self._num_bad = 0

    @property
    def num_tokens(self) -> int:
        """Of all shards so far."""
        in_open = self._open.num_tokens if self._open else 0
        return sum(record.tokens for record in self.records) + in_open

    def counts(self) -> Counts:
        """Totals; rows left out behind the last shard count, too."""
        return Counts(
            documents=sum(record.documents for record in self.records),
            tokens=sum(record.tokens for record in self.records),
            text_bytes=sum(record.text_bytes for record in self.records),
            empty_documents=sum(record.empty_documents for record in self.records)
            + self._num_empty,
            bad_rows=sum(record.bad_rows for record in self.records) + self._num_bad,
        )

    def add(self, batch: EncodedRows) -> None:
        """Add all documents of the batch.

        Raises:
            OSError: the disk is full.
        """
        ends = np.concatenate([[0], np.cumsum(batch.lengths)])
        first = rows_done = 0
        while (last := self._filled_by(ends, first)) is not None:
            rows = (rows_done, int(batch.rows[last - 1]))
            self._take(batch, slice(first, last), ends, rows)
            self.close()
            first, rows_done = last, rows[1]
        self._take(batch, slice(first, len(batch.lengths)), ends, (rows_done, batch.last_row))

    def close(self) -> None:
        """End the open shard, if there is one, and take it down.

        Raises:
            OSError: the disk is full.
        """
        if self._open is None:
            return
        record = self._open.publish(
            num_bytes=self._num_bytes, num_empty=self._num_empty, num_bad=self._num_bad
        )
        self._progress.add(record, self._cursor)
        self.records.append(record)
        self._open = None
        self._num_bytes = self._num_empty = self._num_bad = 0
        log.info("%s: %s tokens", record.name, f"{record.tokens:,}")

    def discard_open(self) -> None:
        """Delete the shard that is not whole, if there is one."""
        if self._open is not None:
            self._open.discard()

    def _filled_by(self, ends: IdArray, first: int) -> int | None:
        """Behind which document the open shard is full, if one of those from `first` fills it."""
        room = self._tokens_per_shard - (self._open.num_tokens if self._open else 0)
        last = int(np.searchsorted(ends, ends[first] + room))
        return last if last < len(ends) else None

    def _take(
        self, batch: EncodedRows, documents: slice, ends: IdArray, rows: tuple[int, int]
    ) -> None:
        """Write documents, and count the rows behind the first of `rows` up to the second."""
        lengths = batch.lengths[documents]
        if len(lengths):
            if self._open is None:
                self._open = ShardWriter(self._folder, len(self.records), self._token_dtype)
            stretch = slice(ends[documents.start], ends[documents.stop])
            self._open.add(batch.token_ids[stretch], lengths)
            self._num_bytes += int(batch.num_bytes[documents].sum())
        self._num_empty += _within(batch.empty_rows, *rows)
        self._num_bad += _within([bad.row for bad in batch.bad_rows], *rows)
        self._cursor = Cursor(batch.source, rows[1] + 1)


def _within(rows: IdArray | Sequence[int], before: int, last: int) -> int:
    inside = np.asarray(rows, dtype=np.int64)
    return int(((inside > before) & (inside <= last)).sum())
