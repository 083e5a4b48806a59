"""The tokens of a split: made once, kept as an Arrow file, memory-mapped by every rank.

The files lie in the folder `tokens` of the cache folder, one for each content of the examples and
each setting that tokens depend on. An entry that nobody has opened for a month goes when another is
written. The whole folder may be deleted while no run uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_dist.cache import cache_directory
from softprompt_dist.data.batching import (
    Family,
    NoTokenError,
    Tokenised,
    tokenise,
)
from softprompt_dist.data.downloads import exclusive
from softprompt_dist.data.encoding import EncoderSpec
from softprompt_dist.data.token_table import IdRows, TokenTable
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.durable import replace_file
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Buffer

    from softprompt_dist.data.examples import Example

log = logging.getLogger(__name__)

CACHE_VERSION = 3
# Fewer are tokenised about as soon as they are found and checked.
FEWEST_ROWS_KEPT = 2000
DAYS_KEPT = 30
_ROWS_AT_A_TIME = 5000
_CHECKSUM_BYTES = 4


def tokens_of(  # noqa: PLR0913 - as `tokenise`
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: Family,
    max_input_tokens: int,
    append_eos: bool,
    target_prefix: str | None = None,
    input_start: tuple[int, ...] = (),
) -> TokenTable:
    """All ranks: what `tokenise` makes of the examples that have tokens; see `left_out`.

    Rank 0 makes it, the others find it.

    A node with a cache folder of its own makes it once more. Few examples are tokenised by every
    rank. Without a folder to write to, every rank tokenises for itself, after one warning.

    Raises:
        SoftpromptError: as `tokenise`, but for a `NoTokenError`.
    """

    def make() -> TokenTable:
        return _tokenised(
            examples,
            lambda some: tokenise(
                some,
                tokenizer,
                family=family,
                max_input_tokens=max_input_tokens,
                append_eos=append_eos,
                target_prefix=target_prefix,
                input_start=input_start,
            ),
        )

    def find_or_make() -> TokenTable:
        added = [append_eos, target_prefix, input_start]
        settings = [family, max_input_tokens, *added, _exact_state(tokenizer)]
        return _kept(f"{_key(examples, settings)}.arrow", make)

    is_kept = len(examples) >= FEWEST_ROWS_KEPT
    made: list[TokenTable] = []
    ranks.on_main(lambda: made.append(find_or_make()) if is_kept else None)
    return ranks.together(lambda: made[0] if made else find_or_make() if is_kept else make())


def _tokenised(
    examples: Sequence[Example], encode: Callable[[Sequence[Example]], Tokenised]
) -> TokenTable:
    """Part by part: as Python's integers, all of a large split would take ten times the memory."""
    starts = range(0, max(1, len(examples)), _ROWS_AT_A_TIME)
    tables = []
    with phase("tokenising", len(examples), "rows") as told:
        for start in starts:
            part = examples[start : start + _ROWS_AT_A_TIME]
            tables.append(_table_of(part, encode))
            told.advance(len(part))
    return TokenTable.joined(tables)


def _table_of(
    examples: Sequence[Example], encode: Callable[[Sequence[Example]], Tokenised]
) -> TokenTable:
    left_out: set[int] = set()
    try:
        tokens = encode(examples)
    except NoTokenError as error:
        left_out = set(error.positions)
        tokens = encode([e for position, e in enumerate(examples) if position not in left_out])
    table = TokenTable.of(tokens.examples, tokens.num_truncated)
    return replace(table, left_out=tuple(sorted(left_out)))


def _key(examples: Sequence[Example], settings: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, *settings]).encode())
    for example in examples:
        for text in (example.input_text, example.target_text):
            content = text.encode(errors="surrogatepass")
            digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()


def _exact_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Its identity, and whatever else might change an id of any text.

    Two that differ here only may still be one tokenizer: then tokens are made once more.
    """
    return [
        type(tokenizer).__name__,
        tokenizer_identity(tokenizer),
        EncoderSpec.of(tokenizer).digest,
        *(metadata.version(package) for package in ("transformers", "tokenizers")),
    ]


def _kept(name: str, make: Callable[[], TokenTable]) -> TokenTable:
    """The table of this name, made and written unless it is there."""
    folder, table = Path("the cache folder"), None
    try:
        folder = cache_directory() / "tokens"
        if (table := _find(folder / name)) is not None:
            return table
        folder.mkdir(exist_ok=True)
        with exclusive(folder / f".{name}.lock"):  # of another run, or of a rank on this node
            if (table := _find(folder / name)) is None:
                table = make()
                replace_file(folder / name, _content(table))
                _remove_stale(folder)
    except OSError as error:
        _warn_once(folder, error.strerror)
    return make() if table is None else table


def _find(path: Path) -> TokenTable | None:
    """The table in a file, if it is there and whole."""
    try:
        table = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("The cached tokens in %s are damaged (%s) and will be made anew.", path, error)
        return None
    with suppress(OSError):
        os.utime(path)
    return table


def _read(path: Path) -> TokenTable:
    """Map a file that `_content` made.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is damaged.
    """
    import pyarrow as pa

    content = pa.memory_map(str(path)).read_buffer()
    stream = content.slice(0, max(0, content.size - _CHECKSUM_BYTES))
    # Before anything is parsed: Arrow believes the lengths it reads, and would read beyond the end.
    if _checksum(stream) != content.slice(stream.size).to_pybytes():
        raise OSError("its checksum is wrong")
    batch = pa.ipc.open_stream(stream).read_next_batch()
    inputs, targets = (
        IdRows(column.values.to_numpy(), column.offsets.to_numpy()) for column in batch.columns
    )
    num_truncated, left_out = json.loads(batch.schema.metadata[b"num_truncated, left_out"])
    return TokenTable(inputs, targets, num_truncated, tuple(left_out))


def _content(table: TokenTable) -> bytes:
    """An Arrow stream, and its checksum, which readers of such a stream do not see."""
    import pyarrow as pa

    columns = [
        pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.ids))
        for rows in (table.inputs, table.targets)
    ]
    batch = pa.record_batch(columns, names=("input_ids", "target_ids"))
    numbers = json.dumps([table.num_truncated, table.left_out])
    batch = batch.replace_schema_metadata({"num_truncated, left_out": numbers})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    stream: bytes = sink.getvalue().to_pybytes()
    return stream + _checksum(stream)


def _checksum(stream: Buffer) -> bytes:
    return zlib.crc32(stream).to_bytes(_CHECKSUM_BYTES, "little")


def _remove_stale(folder: Path) -> None:
    """Delete what nobody has opened for a month, what a killed process left included."""
    oldest = time.time() - DAYS_KEPT * 86400
    for path in folder.iterdir():
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


@cache
def _warn_once(folder: Path, why: str) -> None:
    if ranks.is_main():
        log.warning(
            "Tokens cannot be kept in %s (%s), so that every run makes them anew. Set "
            "SOFTPROMPT_CACHE to a folder that can be written.",
            folder,
            why,
        )
