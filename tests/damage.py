"""What befalls files: damage, a full disk, a permission that is missing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest


def flip_bit(path: Path) -> None:
    """In the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """To half of its length."""
    os.truncate(path, path.stat().st_size // 2)


def names(folder: Path) -> list[str]:
    """Of all that lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def disk_full(*_: Any) -> NoReturn:
    """In place of any function that writes."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def denied(path: object, *_: Any) -> NoReturn:
    """In place of any function of a path that writes or reads."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def full_at_call(call: int, write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, for which there is no room at its call of that number and at no other."""
    calls = 0

    def maybe_full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            disk_full()
        return write(*arguments)

    return maybe_full


def fill_disk_at_flush(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk is full at one `fsync`; the others do nothing."""
    monkeypatch.setattr(os, "fsync", full_at_call(call, lambda descriptor: None))
