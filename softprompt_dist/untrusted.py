"""Files and JSON that somebody else may have written: bounded, of the right kind, or an error.

Whatever is wrong is an OSError or a ValueError, for the reader to explain: never a recursion that
fails deep in a parser, a pipe that is waited for, or a device without end.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice; parsers take the last without a word."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe, a socket or a device is refused and not waited for.

    Raises:
        OSError: it cannot be opened, is no regular file, or is what Git LFS puts in a file's place.
    """
    # O_NONBLOCK: a pipe that nobody writes to would be waited for by `open` itself.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(22, "Is no regular file", str(path))
        if os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
            what = "Is a Git LFS pointer: fetch the file itself (git lfs pull)"
            raise OSError(22, what, str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a file that may have up to `max_bytes`.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is longer.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Asked for more, Python would allocate it first.
        content = file.read(min(size, max_bytes) + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def parse_json(content: bytes | str) -> Any:
    """The value that UTF-8 JSON stands for; keys differ, numbers are finite, text is Unicode.

    Raises:
        ValueError: it is not JSON, or one of these.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=object_of, parse_constant=_not_finite)
        if "\\u" in text:
            # Half of a surrogate pair can be escaped, and could never be written down again.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON that these pairs are: an `object_pairs_hook`.

    Raises:
        RepeatedKeyError: a key stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"the key {twice!r:.80} stands there twice")
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
