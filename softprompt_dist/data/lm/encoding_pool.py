"""Rows to token ids in worker processes, in the order of the rows."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any

import numpy as np
import numpy.typing as npt

from softprompt_dist.data.encoding import Encoder, EncoderSpec
from softprompt_dist.data.lm.documents import BadRow, RawRows, documents_of
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import polling, stop

IdArray = npt.NDArray[np.int64]

_AHEAD = 2
"""Batches that wait for each worker."""


@dataclass(frozen=True)
class EncodedRows:
    """The documents of rows that follow one another in a source."""

    source: int
    last_row: int
    token_ids: npt.NDArray[Any]
    lengths: IdArray
    """Ids of each document, at least one."""
    rows: IdArray
    """Of each document."""
    num_bytes: IdArray
    """Of each document's text as UTF-8."""
    empty_rows: IdArray
    bad_rows: tuple[BadRow, ...]
    position: int
    """See `RawRows`."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_rows(raw: RawRows, encode: Encoder) -> EncodedRows:
    """The documents among the rows and their ids; one without any id is empty."""
    found = documents_of(raw)
    encoded = encode(found.texts)
    is_empty = encoded.lengths == 0
    rows = np.array(found.rows, dtype=np.int64)
    num_bytes = np.fromiter((len(text.encode()) for text in found.texts), np.int64, len(rows))
    return EncodedRows(
        source=raw.source,
        last_row=raw.first_row + len(raw.values) - 1,
        token_ids=encoded.token_ids,
        lengths=encoded.lengths[~is_empty],
        rows=rows[~is_empty],
        num_bytes=num_bytes[~is_empty],
        empty_rows=np.sort(np.concatenate([rows[is_empty], found.empty_rows]).astype(np.int64)),
        bad_rows=tuple(found.bad_rows),
        position=raw.position,
    )


@contextmanager
def encoding_in_order(
    batches: Iterable[RawRows], spec: EncoderSpec, workers: int
) -> Iterator[Iterator[EncodedRows]]:
    """`encode_rows` of every batch, by `workers` processes; by this one if there is but one.

    Few batches are ahead of what is taken, so that memory does not grow with the text.

    Raises:
        MachineError: while iterating: a worker was killed.
        StoppedError: while iterating: somebody listens (`polling`), and there was a signal.
    """
    if workers == 1:
        encode = spec.encoder()
        yield _polled(encode_rows(raw, encode) for raw in batches)
        return
    # Not forked: the process may have threads, of tokenizers or of a device.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (spec,))
    others = set(active_children())
    try:
        yield _polled(_in_order(pool, batches, workers))
    except BrokenProcessPool as error:
        # The pool would end the workers that are left by a signal that they ignore.
        for worker in set(active_children()) - others:
            worker.kill()
        raise MachineError(
            f"One of {workers} processes that tokenise was killed, perhaps for memory. What was "
            f"built stays: start the same command again with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _polled(encoded: Iterator[EncodedRows]) -> Iterator[EncodedRows]:
    for rows in encoded:
        polling.poll()
        yield rows


def _in_order(pool: Executor, batches: Iterable[RawRows], workers: int) -> Iterator[EncodedRows]:
    remaining = iter(batches)
    waiting: deque[Future[EncodedRows]] = deque()
    with _signals_held_back():
        first = islice(remaining, _AHEAD * workers)
        waiting.extend(pool.submit(_encode_here, raw) for raw in first)
    while waiting:
        encoded = waiting.popleft().result()
        with _signals_held_back():
            waiting.extend(pool.submit(_encode_here, raw) for raw in islice(remaining, 1))
        yield encoded


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """From processes that are started here, until they can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    encode: Encoder


def _start_worker(spec: EncoderSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to report
    stop.ignore_in_child()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop.SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.encode = staticmethod(spec.encoder())


def _end_with_parent() -> None:
    """A killed process ends no child of its own, and they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_here(raw: RawRows) -> EncodedRows:
    return encode_rows(raw, _Worker.encode)
