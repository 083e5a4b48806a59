"""Plain text -> token ids, once -> examples of a denoising objective, by position.

A corpus is a list of text files, one document a line. The token ids of all documents lie end to end
in one flat array beside the offsets of the documents; both are cached under the fingerprint of the
files and the tokenizer, and read memory-mapped. What the example at a position of the run is,
depends on (seed, corpus, position) alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from softprompt_dist.data.batching import tokenizer_fingerprint
from softprompt_dist.data.downloads import file_sha256
from softprompt_dist.errors import DataError

log = logging.getLogger(__name__)

LINES_AT_A_TIME = 2000
CACHE_VERSION = 1


@dataclass(frozen=True)
class TokenisedCorpus:
    """All documents end to end, in the order of the files."""

    token_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    """Document i is `token_ids[offsets[i] : offsets[i + 1]]`."""
    fingerprint: str
    """Identity of the files' content, their repetitions and the tokenizer."""


@dataclass(frozen=True)
class Pieces:
    """Stretches of the corpus, each of which becomes one example."""

    corpus: TokenisedCorpus
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.starts)

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Token ids of piece `index`."""
        stretch = self.corpus.token_ids[self.starts[index] : self.ends[index]]
        return stretch.astype(np.int64)


def open_text(path: Path) -> IO[str]:
    """Open a text file, `.gz` and `.xz` included.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"Text file {path} does not exist. Give a path to plain text, .gz or .xz.")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    return cast(IO[str], opener(path, "rt", encoding="utf-8"))


def documents(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank.

    Raises:
        DataError: the file is missing, damaged or not UTF-8.
    """
    try:
        with open_text(path) as lines:
            yield from (text for line in lines if (text := line.strip()))
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"Cannot read {path}: {error}. It must be UTF-8 text.") from error


def parse_repeats(spec: str) -> tuple[Path, int]:
    """`path*3` -> (path, 3); `path` -> (path, 1)."""
    match = re.fullmatch(r"(.+)\*([1-9]\d*)", spec)
    return (Path(match[1]), int(match[2])) if match else (Path(spec), 1)


def tokenise_corpus(specs: Sequence[str], tokenizer: Any, cache: Path) -> TokenisedCorpus:
    """Token ids of the files, from `cache` where they were tokenised before.

    Raises:
        DataError: a file is missing or unreadable, or there is no text in any of them.
    """
    parsed = [parse_repeats(spec) for spec in specs]
    tokenizer_digest = tokenizer_fingerprint(tokenizer)
    parts, names = [], []
    for path, repeats in parsed:
        if not path.is_file():
            raise DataError(f"Corpus file {path} does not exist. Name text files in `corpus`.")
        name = f"v{CACHE_VERSION}-{file_sha256(path)[:16]}-{tokenizer_digest[:16]}"
        parts += [_tokenised_file(path, tokenizer, cache / name)] * repeats
        names += [name] * repeats
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    if not lengths.sum():
        raise DataError(f"The corpus {', '.join(specs)} holds no text.")
    fingerprint = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    ids = parts[0][0] if len(parts) == 1 else np.concatenate([p[0] for p in parts])
    return TokenisedCorpus(ids, np.concatenate([[0], np.cumsum(lengths)]), fingerprint)


def cut_concatenated(corpus: TokenisedCorpus, piece_length: int) -> Pieces:
    """Pieces of equal length of all documents end to end; the incomplete last one is dropped.

    Raises:
        DataError: the corpus is shorter than one piece.
    """
    starts = np.arange(len(corpus.token_ids) // piece_length) * piece_length
    if not len(starts):
        raise DataError(
            f"The corpus has {len(corpus.token_ids)} tokens, but one example needs {piece_length}. "
            "Give more text or a shorter inputs_length."
        )
    return Pieces(corpus, starts, starts + piece_length)


def cut_documents(corpus: TokenisedCorpus, piece_length: int) -> Pieces:
    """Every document cut into pieces on its own; its last piece may be shorter."""
    lengths = np.diff(corpus.offsets)
    counts = -(-lengths // piece_length)
    first_piece = np.repeat(np.cumsum(counts) - counts, counts)
    within = np.arange(counts.sum()) - first_piece
    starts = np.repeat(corpus.offsets[:-1], counts) + within * piece_length
    ends = np.minimum(starts + piece_length, np.repeat(corpus.offsets[1:], counts))
    return Pieces(corpus, starts, ends)


def _tokenised_file(
    path: Path, tokenizer: Any, folder: Path
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    ids_path, offsets_path = folder / "ids.npy", folder / "offsets.npy"
    if not offsets_path.is_file():
        log.info("Tokenising %s ...", path)
        ids, offsets = _encode(path, tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        _save_array(ids_path, ids)
        _save_array(offsets_path, offsets)
    return np.load(ids_path, mmap_mode="r"), np.load(offsets_path, mmap_mode="r")


def _encode(path: Path, tokenizer: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    parts, lengths, lines = [np.empty(0, dtype=np.int32)], [0], list(documents(path))
    for start in range(0, len(lines), LINES_AT_A_TIME):
        batch = lines[start : start + LINES_AT_A_TIME]
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False).input_ids
        lengths += map(len, encoded)
        parts += [np.asarray(ids, dtype=np.int32) for ids in encoded]
    return np.concatenate(parts), np.cumsum(lengths)


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    # A name of its own: other ranks, or other runs, may be tokenising the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
