"""Sources of text to a corpus: shards of token ids and a manifest, the same bytes however built."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_dist.data.batching import tokenizer_fingerprint
from softprompt_dist.data.encoding import EncoderSpec
from softprompt_dist.data.lm.documents import RawRows
from softprompt_dist.data.lm.encoding_pool import EncodedRows, encoding_in_order, usable_cores
from softprompt_dist.data.lm.manifest import (
    MANIFEST,
    Counts,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    fingerprint_of,
    read_manifest,
    write_manifest,
)
from softprompt_dist.data.lm.progress import PROGRESS, Cursor, ProgressFile, hold
from softprompt_dist.data.lm.shard_sequence import ShardSequence
from softprompt_dist.data.lm.text_sources import TextSource
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.durable import flush_folder
from softprompt_dist.errors import DataError, MachineError
from softprompt_dist.progress import counted, phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a corpus, so that it can be read back."""
TOKENS_PER_SHARD = 1 << 27


@dataclass(frozen=True)
class BuildRequest:
    """What to build."""

    sources: Sequence[TextSource]
    field_name: str = "text"
    part: str | None = None
    """For the manifest; the sources are those of the part."""
    tokens_per_shard: int = TOKENS_PER_SHARD
    skip_bad: bool = False
    """Leave out rows that are not text and count them; do not end with the first."""
    workers: int | None = None
    """Processes that tokenise; default: one a core. Changes nothing in what is built."""


def build_corpus(
    request: BuildRequest, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Manifest:
    """Tokenise the sources into `folder`, or finish what an interrupted call began there.

    Raises:
        DataError: a row or a source is unusable, there is no text at all, or the folder holds
            something else.
        MachineError: the disk is full. Whole shards stay and another call goes on.
    """
    is_new = _prepare(folder)
    with _disk_errors(folder), hold(folder):
        try:
            if (folder / MANIFEST).exists():
                return _finished(request, tokenizer, folder)
            return _Build(request, tokenizer, folder).run()
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _prepare(folder: Path) -> bool:
    """Whether the folder was made here."""
    is_new = not folder.exists()
    if folder.is_file():
        raise DataError(f"{folder} is a file; a corpus is a folder. Choose another name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot make the folder {folder}: {error.strerror}. Choose a place for it that can be "
            f"written to."
        ) from error
    names = {path.name for path in folder.iterdir()}
    if names and not names & {PROGRESS, MANIFEST, ".lock"}:
        raise DataError(
            f"{folder} is not empty ({min(names)}) and holds no corpus. Choose another folder."
        )
    return is_new


def _finished(request: BuildRequest, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Manifest:
    """The manifest, if the folder holds what is asked for."""
    found = read_manifest(folder)
    asked: dict[str, Any] = {
        "tokenizer": [],
        "field": request.field_name,
        "part": request.part,
        "tokens_per_shard": request.tokens_per_shard,
        "sources": _source_records(request.sources),
    }
    there = found.model_dump(include=asked.keys() - {"tokenizer", "sources"}) | {
        "tokenizer": found.tokenizer.unlike(tokenizer_identity(tokenizer)),
        "sources": found.sources,
    }
    if different := [key for key in asked if asked[key] != there[key]]:
        raise DataError(
            f"{folder} holds a finished corpus of something else ({', '.join(different)} "
            f"differ). Choose another folder, or delete this one."
        )
    ProgressFile(folder).delete()  # left by an interruption at the very end
    log.info("%s is finished already.", folder)
    return found


class _Build:
    """One call of `build_corpus` that has something to do."""

    def __init__(
        self, request: BuildRequest, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        self._request, self._tokenizer, self._folder = request, tokenizer, folder
        self._spec = EncoderSpec.of(tokenizer)
        self._progress = ProgressFile(folder)

    def run(self) -> Manifest:
        """Go on from the last whole shard to the manifest."""
        plan = self._plan()
        done = self._progress.start_or_resume(plan)
        for path in self._folder.glob(".tmp-*"):  # of a build that was killed
            path.unlink()
        shards = ShardSequence(
            self._folder,
            self._spec.dtype,
            self._request.tokens_per_shard,
            done,
            self._progress,
        )
        try:
            self._encode_all(shards, done.cursor)
            shards.close()
            return self._write_manifest(shards, plan)
        finally:
            shards.discard_open()
            if not shards.records:  # nothing to go on from
                self._progress.delete()

    def _plan(self) -> dict[str, Any]:
        """All that the bytes depend on."""
        return {
            "version": 1,
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "tokenizer_rules": self._spec.digest,
            "field": self._request.field_name,
            "part": self._request.part,
            "tokens_per_shard": self._request.tokens_per_shard,
            "sources": [source.identity() for source in self._request.sources],
        }

    def _encode_all(self, shards: ShardSequence, cursor: Cursor) -> None:
        rows = self._rows_from(cursor)
        workers = self._request.workers or usable_cores()
        starts = _starts(self._request.sources)
        total, before = (None, 0) if starts is None else (starts[-1], starts[cursor.source])
        with (
            encoding_in_order(rows, self._spec, workers) as encoded,
            phase("tokenising", total, "B", before) as told,
        ):
            for batch in encoded:
                if batch.bad_rows and not self._request.skip_bad:
                    raise DataError(self._bad_row(batch))
                shards.add(batch)
                more = int(batch.num_bytes.sum())
                if starts is not None:
                    more = max(0, starts[batch.source] + batch.position - int(told.done))
                told.advance(more, f"{shards.num_tokens / 1e6:.1f}M tokens")

    def _rows_from(self, cursor: Cursor) -> Iterator[RawRows]:
        for number, source in enumerate(self._request.sources):
            if number >= cursor.source:
                yield from source.rows(number, cursor.row if number == cursor.source else 1)

    def _bad_row(self, batch: EncodedRows) -> str:
        source, bad = self._request.sources[batch.source], batch.bad_rows[0]
        return (
            f"{source.unit} {bad.row} of {source.name} {bad.reason}. Correct or remove it, or "
            f"leave such rows out with --skip-bad, which counts them."
        )

    def _write_manifest(self, shards: ShardSequence, plan: dict[str, Any]) -> Manifest:
        counts = shards.counts()
        if not shards.records:
            raise DataError(self._no_text(counts))
        records = _source_records(self._request.sources)
        if plan != self._plan():
            raise DataError(
                "A source was changed while it was read. Delete the corpus and build it again."
            )
        self._save_tokenizer()
        fingerprint = plan["tokenizer"]
        manifest = Manifest(
            fingerprint=fingerprint_of(fingerprint, shards.records),
            tokenizer=TokenizerRecord(
                name=Path(self._tokenizer.name_or_path).name or "unnamed",
                fingerprint=fingerprint,
                vocabulary_size=self._spec.vocabulary_size,
                ids_of_probe=str(tokenizer_identity(self._tokenizer)["ids_of_probe"]),
            ),
            token_dtype="uint16" if self._spec.dtype == "<u2" else "uint32",
            field=self._request.field_name,
            part=self._request.part,
            tokens_per_shard=self._request.tokens_per_shard,
            total=counts,
            sources=records,
            shards=tuple(shards.records),
        )
        write_manifest(self._folder, manifest)
        self._progress.delete()
        return manifest

    def _no_text(self, counts: Counts) -> str:
        names = ", ".join(source.name for source in self._request.sources[:5])
        return (
            f"There is no text in {names}: {counts.empty_documents:,} empty and "
            f"{counts.bad_rows:,} bad rows, and no other. Name sources with text."
        )

    def _save_tokenizer(self) -> None:
        folder = self._folder / TOKENIZER
        self._tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(folder)


def _starts(sources: Sequence[TextSource]) -> list[int] | None:
    """Bytes before each source, and in all; None where not all sizes are known."""
    sizes = [source.num_bytes for source in sources]
    if None in sizes:
        return None
    return [sum(size or 0 for size in sizes[:number]) for number in range(len(sizes) + 1)]


def _source_records(sources: Sequence[TextSource]) -> tuple[SourceRecord, ...]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = pool.map(lambda source: source.record(), sources)
        told = counted(sources, "checksums of the sources", "files")
        return tuple(
            SourceRecord(name=source.name, **record)
            for source, record in zip(told, found, strict=True)
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        num_shards = len(list(folder.glob("shard-*.offsets")))
        raise MachineError(
            f"No space left in {folder}. {num_shards} whole shards stay: free some space and "
            f"start the same command again to go on."
        ) from error
