"""Data sets of the hub: which commit is read is known, and it is the one that was asked for.

Where the hub does not answer, `datasets` gives the newest copy that this machine has kept of a data
set, whichever revision it is of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.errors import DataError
from softprompt_dist.progress import phase

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataSet:
    """A data set whose rows have not been read yet."""

    builder: Any
    """The `datasets.DatasetBuilder` of them."""
    commit: str | None
    """What it reads, in hex. None: a folder of this machine, or a copy that does not say."""


def find_data_set(name: str, subset: str | None, revision: str | None) -> HubDataSet:
    """The data set at `revision`, or at the newest one that can be had.

    Raises:
        DataError: the name is a folder's and a revision is given, or the hub does not answer and
            this machine has kept no copy of that very revision.
        Exception: what the hub's client raises of unknown names.
    """
    from datasets import config
    from datasets.packaged_modules.cache.cache import Cache

    if Path(name, config.DATASET_STATE_JSON_FILENAME).exists():
        raise DataError(
            f"{name} was written by save_to_disk. Write it with to_parquet or to_json, and name "
            f"the files."
        )
    if revision and Path(name).is_dir():
        raise DataError(
            f"Revision {revision!r} of {name} is asked for, but this is a folder of this machine, "
            f"which has no revisions. Remove the revision."
        )
    builder = _builder(name, subset, revision)
    commit = _commit_of(builder)
    if revision is None or not isinstance(builder, Cache):
        return HubDataSet(builder, commit)
    wanted = revision if _COMMIT.fullmatch(revision) else _last_known(name, revision)
    if wanted is None or wanted != commit:
        builder = _kept(builder, name, wanted)
    if builder is None:
        raise DataError(
            f"Revision {revision} of data set {name} cannot be had: the hub does not answer, and "
            f"what this machine has kept is of {commit or 'a revision that it does not tell'}. A "
            f"revision that is asked for is what is read, or nothing. Start once where the hub can "
            f"be reached (HF_HUB_OFFLINE=0), ask for the revision that is kept, or name files."
        )
    return HubDataSet(builder, wanted)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep `datasets` from drawing any; people are told that the hub is asked."""
    import datasets

    were_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with phase("fetching rows from the hub"):
            yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()


def _builder(name: str, subset: str | None, revision: str | None) -> Any:
    import datasets

    with without_progress_bars():
        return datasets.load_dataset_builder(name, subset, revision=revision)


def _commit_of(builder: Any) -> str | None:
    """Its hash is the commit; in folders of older clients the addresses of the files have it."""
    if _COMMIT.fullmatch(builder.hash or ""):
        return str(builder.hash)
    addresses = " ".join(map(str, builder.info.download_checksums or ()))
    found = re.search(rf"/{re.escape(builder.repo_id or '')}@([0-9a-f]{{40}})/", addresses)
    return found[1] if found else None


def _last_known(name: str, revision: str) -> str | None:
    """The commit that a branch or tag was when the hub was last asked for it from this machine."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            allow_patterns="README.md",
            local_files_only=True,
        )
    except Exception:  # no such thing was kept, said in several kinds of its own
        return None
    return Path(folder).name


def _kept(newest: Any, name: str, commit: str | None) -> Any:
    """The copy of `commit` that lies beside the newest, if there is one."""
    if commit is None or not (Path(newest.cache_dir).parent / commit).is_dir():
        return None
    return type(newest)(
        repo_id=name,
        dataset_name=newest.dataset_name,
        config_name=newest.config.name,
        version=str(newest.config.version),
        hash=commit,
    )
