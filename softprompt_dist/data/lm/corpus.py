"""Built corpora and text files as one source of tokens, mapped from the disk."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt_dist.data.batching import tokenizer_fingerprint
from softprompt_dist.data.downloads import exclusive
from softprompt_dist.data.encoding import EncoderSpec
from softprompt_dist.data.lm.build import BuildRequest, build_corpus
from softprompt_dist.data.lm.encoding_pool import usable_cores
from softprompt_dist.data.lm.manifest import MANIFEST, Manifest, read_manifest
from softprompt_dist.data.lm.progress import PROGRESS
from softprompt_dist.data.lm.shards import ConcatenatedTokens, Shard
from softprompt_dist.data.lm.text_sources import FileSource, file_source
from softprompt_dist.data.lm.token_source import TokenSource
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.durable import new_folder
from softprompt_dist.errors import DataError
from softprompt_dist.progress import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_CACHE_VERSION = 1
_PART = re.compile(r"part-(\d{5})-of-(\d{5})")
# A process takes a second or two to start, in which another tokenises so much.
_BYTES_WORTH_A_WORKER = 10_000_000


class BuiltCorpus(ConcatenatedTokens):
    """The documents of one folder that `build_corpus` finished. Memory: its list of shards."""

    def __init__(self, folder: Path) -> None:
        """Open it; every file must be there and have its size.

        Raises:
            DataError: no corpus, an unfinished or a damaged one.
        """
        self.folder = folder
        self.manifest = _manifest_in(folder)
        dtype = {"uint16": "<u2", "uint32": "<u4"}[self.manifest.token_dtype]
        self._shards = [Shard(folder, record, dtype) for record in self.manifest.shards]
        for shard in self._shards:
            shard.check_sizes()
        super().__init__(self._shards, self.manifest.fingerprint)

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Compare the checksums of every file, or of one part of them, with the manifest.

        Raises:
            DataError: one differs.
        """
        shards = self._shards[part::num_parts]
        for shard in counted(shards, f"checksums of {self.folder.name}", "shards"):
            shard.check_content()


def part_name(part: int, num_parts: int) -> str:
    """Of the folder that `--part PART/NUM_PARTS` fills."""
    return f"part-{part:05d}-of-{num_parts:05d}"


def built_corpora(folder: Path) -> list[BuiltCorpus]:
    """The corpus in `folder`, or all parts of which it consists.

    Raises:
        DataError: no corpus, an unfinished or a damaged one, or a part is missing.
    """
    if (folder / MANIFEST).exists():
        return [BuiltCorpus(folder)]
    found = {}
    if folder.is_dir():
        found = {
            path.name: int(match[2])
            for path in folder.iterdir()
            if (match := _PART.fullmatch(path.name))
        }
    if not found:
        return [BuiltCorpus(folder)]
    if len(numbers := set(found.values())) > 1:
        builds = " and of ".join(map(str, sorted(numbers)))
        raise DataError(
            f"{folder} holds parts of several builds: of {builds} parts. Delete those of the older."
        )
    (num_parts,) = numbers
    names = [part_name(part, num_parts) for part in range(1, num_parts + 1)]
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{folder} lacks {missing[0]}"
            f"{f' and {len(missing) - 1} other parts' if len(missing) > 1 else ''} of {num_parts}. "
            f"Build what is missing with --part."
        )
    return [BuiltCorpus(folder / name) for name in names]


def open_corpus(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    *,
    verify: bool = False,
) -> TokenSource:
    """All documents of the specs, one spec after another.

    Args:
        specs: folders of `softprompt corpus build`, or text files; `path*3` stands there three
            times, without a copy.
        tokenizer: what the folders must have been built with.
        cache: where text files are tokenised to, unless they were before. Several processes may
            do it at once.
        verify: compare the checksums of all folders, too, not only the sizes of their files.

    Raises:
        DataError: something is missing, damaged, of another tokenizer, or without any text.
    """
    parts: list[TokenSource] = []
    for spec in specs:
        path, repeats = parse_repeats(spec)
        found = _open_one(path, tokenizer, cache)
        for corpus in found if verify else ():
            corpus.verify()
        parts += found * repeats
    if not parts:
        raise DataError("No corpus is given. Name folders of `softprompt corpus build`, or files.")
    content = [_CACHE_VERSION, *(part.fingerprint for part in parts)]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return ConcatenatedTokens(parts, fingerprint)


def verify_folders(specs: Sequence[str], part: int, num_parts: int) -> None:
    """Compare the checksums of one part of the shards of all folders among the specs.

    Raises:
        DataError: one differs.
    """
    for folder in sorted({path for path, _ in map(parse_repeats, specs) if path.is_dir()}):
        for corpus in built_corpora(folder):
            corpus.verify(part, num_parts)


def parse_repeats(spec: str) -> tuple[Path, int]:
    """`path*3` -> (path, 3); `path` -> (path, 1)."""
    match = re.fullmatch(r"(.+)\*([1-9]\d*)", spec)
    return (Path(match[1]), int(match[2])) if match else (Path(spec), 1)


def _open_one(path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> list[BuiltCorpus]:
    if not path.is_dir():
        return [_tokenised(file_source(path), tokenizer, cache)]
    found = built_corpora(path)
    identity = tokenizer_identity(tokenizer)
    for corpus in found:
        made_by = corpus.manifest.tokenizer
        if different := made_by.unlike(identity):
            raise DataError(
                f"Corpus {corpus.folder} was built with tokenizer {made_by.name} and not with this "
                f"run's ({'; '.join(different)}). Build it again with this tokenizer, or set "
                "`tokenizer` to that one."
            )
    return found


def _tokenised(source: FileSource, tokenizer: PreTrainedTokenizerBase, cache: Path) -> BuiltCorpus:
    """The file's corpus in the cache, made unless it is there."""
    sha256 = source.record()["sha256"]
    identity = [_CACHE_VERSION, sha256, source.format, source.field_name]
    identity += [tokenizer_fingerprint(tokenizer), EncoderSpec.of(tokenizer).digest]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache / f".{name}.lock"):  # of another process on this node, or of all nodes
        found = _in_cache(folder)
        return found if found is not None else _fill_cache(source, tokenizer, folder)


def _in_cache(folder: Path) -> BuiltCorpus | None:
    if not folder.exists():
        return None
    try:
        return BuiltCorpus(folder)
    except DataError as error:
        log.warning("The tokens in %s are damaged and will be made anew: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _fill_cache(
    source: FileSource, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> BuiltCorpus:
    log.info("Tokenising %s ...", source.path)
    worth = (source.num_bytes or 0) // _BYTES_WORTH_A_WORKER
    workers = max(1, min(usable_cores(), worth))
    try:
        with new_folder(folder) as made:
            build_corpus(
                BuildRequest([source], source.field_name, workers=workers), tokenizer, made
            )
    except OSError:
        # Without locks another process may have been at it, too, and been quicker.
        if not (folder / MANIFEST).exists():
            raise
    return BuiltCorpus(folder)


def _manifest_in(folder: Path) -> Manifest:
    if (folder / MANIFEST).exists():
        return read_manifest(folder)
    if (folder / PROGRESS).exists():
        raise DataError(
            f"The build of {folder} was interrupted. Start the same `softprompt corpus build` "
            f"again; it goes on where it stopped."
        )
    if folder.is_dir():
        what = "is no corpus: it has no manifest.json"
    else:
        what = "is a file, and a corpus is a folder" if folder.exists() else "does not exist"
    raise DataError(f"{folder} {what}. Name a folder that `softprompt corpus build` made.")


def total_of(corpora: Iterable[BuiltCorpus], count: str) -> int:
    """Sum of one of the manifest's counts."""
    return sum(getattr(corpus.manifest.total, count) for corpus in corpora)
