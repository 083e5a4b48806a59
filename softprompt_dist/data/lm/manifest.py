"""manifest.json of a built corpus: what is in it, what it was made of, checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError

from softprompt_dist.durable import replace_file
from softprompt_dist.errors import DataError
from softprompt_dist.names import Name
from softprompt_dist.section import NotNegative, Positive, Section
from softprompt_dist.untrusted import parse_json, read_bounded

MANIFEST = "manifest.json"
VERSION = 1
_MAX_BYTES = 1 << 28
"""Of a million shards."""


class _Record(Section):
    """What is read as long as it is known; later releases may add keys."""

    model_config = ConfigDict(extra="ignore")


class TokenizerRecord(_Record):
    """Which tokenizer made the ids."""

    name: str
    """For people; a folder's name without its path."""
    fingerprint: str
    """`tokenizer_fingerprint`: pieces and ids."""
    vocabulary_size: Positive
    """Largest id plus one."""
    ids_of_probe: str | None = None
    """Of `tokenizer_identity`; release 0.1.0 did not note them."""

    def unlike(self, identity: Mapping[str, object]) -> list[str]:
        """What a tokenizer of this `tokenizer_identity` has otherwise, with both values."""
        there = {"vocabulary": self.fingerprint, "ids_of_probe": self.ids_of_probe}
        return [
            f"{name} {value[:12]} there, {identity[name]!s:.12} here"
            for name, value in there.items()
            if value is not None and value != identity[name]
        ]


class SourceRecord(_Record):
    """What was read."""

    name: str
    sha256: str | None = None
    """Of a file."""
    revision: str | None = None
    """Of a data set of the hub."""


class Counts(_Record):
    """What rows came to."""

    documents: NotNegative
    tokens: NotNegative
    text_bytes: NotNegative
    """Of the documents' texts as UTF-8."""
    empty_documents: NotNegative
    """Left out: blank, or without a token."""
    bad_rows: NotNegative
    """Left out: not UTF-8, binary, without text."""


class ShardRecord(Counts):
    """A shard, and the rows that were read for it."""

    name: Name
    """Of its files, without their endings."""
    tokens_sha256: str
    offsets_sha256: str


class Manifest(_Record):
    """All of manifest.json."""

    format: Literal["softprompt-corpus"] = "softprompt-corpus"
    version: Literal[1] = 1
    fingerprint: str
    """See `fingerprint_of`."""
    tokenizer: TokenizerRecord
    token_dtype: Literal["uint16", "uint32"]
    field: str
    """Of the text, where rows have fields."""
    part: str | None
    """Such as 3/16: of these source files every 16th, from the third."""
    tokens_per_shard: Positive
    """A shard ends with the first document that reaches so many."""
    total: Counts
    sources: tuple[SourceRecord, ...]
    shards: tuple[ShardRecord, ...]


def fingerprint_of(tokenizer_fingerprint: str, shards: Sequence[ShardRecord]) -> str:
    """Hex sha256 over the tokenizer's fingerprint and the checksums of all shards."""
    checksums = [[shard.tokens_sha256, shard.offsets_sha256] for shard in shards]
    content = json.dumps([VERSION, tokenizer_fingerprint, checksums])
    return hashlib.sha256(content.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it; from then on the corpus counts as finished.

    Raises:
        OSError: the disk is full.
    """
    content = json.dumps(manifest.model_dump(exclude_none=True), indent=1, ensure_ascii=False)
    replace_file(folder / MANIFEST, f"{content}\n".encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished corpus.

    Raises:
        DataError: it is unreadable, of another version, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        values = parse_json(read_bounded(path, _MAX_BYTES))
        if isinstance(values, dict) and values.get("version", VERSION) != VERSION:
            raise DataError(
                f"{path} has version {values['version']!r:.40}, and this release reads {VERSION}. "
                f"Build the corpus again with this release."
            )
        if not isinstance(values, dict):
            raise ValueError(f"it is no object but a {type(values).__name__}")
        manifest = Manifest.model_validate({"part": None} | values)
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            said = str(error)
        raise DataError(f"{path} is damaged ({said}). Copy it again, or build it anew.") from error
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Manifest) -> None:
    expected = fingerprint_of(manifest.tokenizer.fingerprint, manifest.shards)
    if manifest.fingerprint != expected:
        raise DataError(
            f"{path} has fingerprint {manifest.fingerprint[:12]}..., and its shards' checksums "
            f"give {expected[:12]}...: it was edited. Copy it again, or build it anew."
        )
    for count in ("documents", "tokens"):
        total, stated = (
            sum(getattr(s, count) for s in manifest.shards),
            getattr(manifest.total, count),
        )
        if total != stated:
            raise DataError(
                f"{path} says {stated:,} {count}, and its shards have {total:,}: it was edited. "
                f"Copy it again, or build it anew."
            )
