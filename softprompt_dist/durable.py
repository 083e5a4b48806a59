"""Files that survive a crash: written, flushed to the disk, and only then given their name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
"""How long what a run needs is tried again while the disk is away: servers take minutes to fail
over."""
PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO}
    | {errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
"""What a network disk says that is away for a moment."""
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 15.0
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FileDigest:
    """What tells a file from one that was cut short or changed."""

    num_bytes: int
    sha256: str
    """Hexadecimal."""


def digest_of(content: bytes) -> FileDigest:
    """The digest of a file with this content."""
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def digest_of_file(path: Path, advance: Callable[[int], object] = lambda _: None) -> FileDigest:
    """The digest of a file of any size, which is never whole in memory.

    `advance` is told how many bytes more were read.

    Raises:
        OSError: it cannot be read.
    """
    sha256, num_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            sha256.update(piece)
            num_bytes += len(piece)
            advance(len(piece))
    return FileDigest(num_bytes, sha256.hexdigest())


def free_bytes(path: Path) -> str:
    """How much room there is where `path` is or would be, to be read by people."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(folder).free:,}"
    return "an unknown number"


def explained(work: Callable[[], T], explain: Callable[[OSError], Exception]) -> Callable[[], T]:
    """`work`, raising what `explain` makes of the system's error in place of that."""

    def explaining() -> T:
        try:
            return work()
        except OSError as error:
            raise explain(error) from error

    return explaining


def pauses() -> Iterator[float]:
    """Seconds to wait before the next look at a disk that is away, ever more, for its patience."""
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS
    while time.monotonic() + pause <= deadline:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def patiently(work: Callable[[], T]) -> T:
    """`work`, which may be done twice, again and again while a network disk is away.

    Raises:
        OSError: the disk is away for longer than `PATIENCE_SECONDS`, or refuses for good.
    """
    for pause in pauses():
        try:
            return work()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            log.warning("The disk is away (%s); trying again.", error)
        time.sleep(pause)
    return work()


def write_file(path: Path, content: bytes) -> None:
    """Create `path` with `content` and flush it to the disk.

    Raises:
        FileExistsError: something of that name is there already.
        OSError: the disk is full, or the folder may not be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(
    path: Path, content: bytes, *, flush: bool = True, is_patient: bool = True
) -> None:
    """Give `path` the new `content`; a reader sees the old file or the new one, whole.

    Args:
        path: the file, which need not be there.
        content: all of it.
        flush: without it a crash of the machine, but not of the process, may bring the old one
            back.
        is_patient: whether to try again while a network disk is away: see `patiently`.

    Raises:
        OSError: as `write_file`; the old file is then untouched.
    """
    if is_patient:
        patiently(lambda: replace_file(path, content, flush=flush, is_patient=False))
        return
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        if flush:
            write_file(temporary, content)
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
        if flush:
            flush_folder(path.parent)
    finally:
        with suppress(OSError):  # what was raised before says more
            temporary.unlink(missing_ok=True)


def flush_files(folder: Path) -> None:
    """Flush to the disk what another library wrote below `folder`.

    Raises:
        OSError: the disk is full or fails.
    """
    for path in folder.rglob("*"):
        with _opened(path) as descriptor:
            os.fsync(descriptor)


def extend_file(path: Path, content: bytes) -> None:
    """Add to the end of `path` and flush it to the disk; a crash may leave a part of `content`.

    Raises:
        OSError: the disk is full, or the file may not be written.
    """
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def cut_file(path: Path, size: int) -> None:
    """Take away what `path` holds beyond `size` bytes, and flush it to the disk.

    Raises:
        OSError: the file may not be written.
    """
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename alone may be lost with the power."""
    with _opened(folder) as descriptor:
        os.fsync(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` when the block ends without an error.

    Otherwise it is deleted; what a killed process left of its own is deleted here. Each file put
    there must have been flushed (`write_file`).

    Raises:
        OSError: the disk is full, the folder may not be written, or `path` is there and not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with _opened(temporary) as descriptor:
            with suppress(OSError):  # a file system without locks: nothing is deleted there, either
                _lock(descriptor)
            yield temporary
            os.fsync(descriptor)
            os.rename(temporary, path)  # an empty folder gives way, any other stays
        flush_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _delete_leftovers(path: Path) -> None:
    ours = re.compile(rf"\.tmp-{re.escape(path.name)}-[0-9a-f]{{32}}")
    for folder in path.parent.iterdir():
        if ours.fullmatch(folder.name) and folder.is_dir():
            with suppress(OSError), _opened(folder) as descriptor:
                _lock(descriptor)
                shutil.rmtree(folder)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """The system frees it with the process. OSError if another holds it, or there are no locks."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
