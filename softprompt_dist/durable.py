"""Files that survive a crash: written, flushed to the disk, and only then given their name."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


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


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` the new `content`; a reader sees the old file or the new one, whole.

    Raises:
        OSError: as `write_file`; the old file is then untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename alone may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
