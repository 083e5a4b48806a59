"""Human-rated snippets of Hutto and Gilbert (ICWSM 2014), from a PyPI source distribution (MIT).

Four files (movie reviews, product reviews, newspaper editorials, tweets), each snippet with the
mean rating of twenty people from -4 (most negative) to 4 (most positive).
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from softprompt_dist.data.downloads import fetch_from_index
from softprompt_dist.errors import DataError

_REQUIREMENT = "vaderSentiment==3.3.2"
_FILENAME = "vaderSentiment-3.3.2.tar.gz"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
VADER_TASKS = (*_FILES, "sources")


def vader_rows(name: str) -> list[dict[str, object]]:
    """Rows of the task `name`, from the package index or the cache; see `read_vader`."""
    return read_vader(fetch_from_index(_REQUIREMENT, _FILENAME, _SHA256, source=True), name)


def vader_sha256() -> str:
    """Hex sha256 of the package that all rows come from."""
    return _SHA256


def read_vader(archive: Path, name: str) -> list[dict[str, object]]:
    """Rows with the fields text, label, rating and id, out of the source distribution `archive`.

    `movies`, `amazon`, `nyt`, `tweets`: the snippets of one file, label positive or negative by the
    sign of the mean rating; those rated exactly 0 are left out. `sources`: all snippets, label
    movies, amazon, nyt or tweets.

    Raises:
        DataError: the archive is not the expected one.
    """
    try:
        with tarfile.open(archive) as outer:
            inner = _member(outer, _INNER)
        with tarfile.open(fileobj=io.BytesIO(inner)) as files:
            texts = {source: _member(files, file).decode() for source, file in _FILES.items()}
    except (OSError, EOFError, tarfile.TarError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read {archive} as {_REQUIREMENT}: {error} Delete the file; it is fetched anew."
        ) from error
    if name == "sources":
        return [row | {"label": source} for source in _FILES for row in _snippets(texts[source])]
    return [
        row | {"label": "positive" if rating > 0 else "negative"}
        for row in _snippets(texts[name])
        if (rating := float(str(row["rating"]))) != 0
    ]


def _snippets(text: str) -> list[dict[str, object]]:
    # Not splitlines(): it would also cut at the rarer line separators, which occur inside texts.
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    fields = [line.split("\t", 2) for line in lines]
    return [{"text": text.strip(), "rating": float(r), "id": name} for name, r, text in fields]


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    for member in archive:
        file = archive.extractfile(member) if f"/{member.name}".endswith(f"/{suffix}") else None
        if file is not None:
            return file.read()
    raise KeyError(f"{suffix} is not in it.")
