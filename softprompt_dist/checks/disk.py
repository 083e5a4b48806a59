"""Folders: whether they can be written to, how much fits, and how fast they are."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.checks.finding import Finding
from softprompt_dist.durable import replace_file

GIBIBYTE = 2**30
MEGABYTE = 10**6

_BLOCK_BYTES = 8 * 2**20
_PROBE_BYTES = 128 * 2**20
_PROBE_SECONDS = 1.0
_SLOW_WRITE = 10 * MEGABYTE
_LONG_LOAD_SECONDS = 600.0


def check_folder(name: str, folder: Path, *, needed_bytes: int = GIBIBYTE) -> list[Finding]:
    """Space in `folder`, and a write that survives: written, flushed, renamed, deleted again."""
    existing = nearest_existing(folder)
    probe = existing / f".softprompt-doctor-{uuid.uuid4().hex}"
    try:
        replace_file(probe, b"probe")
        probe.unlink()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        remedy = "Give this user permission or space there, or choose another place."
        return [Finding(name, "fail", f"{existing}: {error.strerror}", remedy)]
    found = f"{folder}: writable, {free / GIBIBYTE:.1f} GiB free"
    if free < needed_bytes:
        remedy = f"About {max(1, round(needed_bytes / GIBIBYTE))} GiB are needed; free some space."
        return [Finding(name, "warn", found, remedy)]
    return [Finding(name, "ok", found)]


def nearest_existing(folder: Path) -> Path:
    """`folder` itself, or the nearest folder above it that is there."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def check_disk_speed(name: str, folder: Path) -> list[Finding]:
    """Write speed in `folder` (flushed to the disk), and the speed of reading it back."""
    existing = nearest_existing(folder)
    try:
        if shutil.disk_usage(existing).free < 2 * _PROBE_BYTES:
            return []
        with _scratch_file(existing) as path:
            written = measure_write(path)
            read = measure_read(path)
    except OSError as error:
        remedy = "Choose another place for it."
        return [Finding(f"{name} speed", "fail", f"{existing}: {error.strerror}", remedy)]
    found = f"write {written / MEGABYTE:,.0f} MB/s, read {read.described}"
    if written < _SLOW_WRITE:
        remedy = "Every checkpoint waits for it. Choose a local disk (--run-dir)."
        return [Finding(f"{name} speed", "warn", found, remedy)]
    return [Finding(f"{name} speed", "ok", found)]


def check_read_speed(name: str, files: list[Path]) -> list[Finding]:
    """How fast the largest of `files` is read here, and how long all of them would take."""
    total = sum(file.stat().st_size for file in files)
    read = measure_read(max(files, key=lambda file: file.stat().st_size))
    seconds = total / read.bytes_per_second
    found = f"{total / 1e9:.2f} GB, read {read.described}: {seconds:.1f} s for all of it"
    if seconds > _LONG_LOAD_SECONDS:
        remedy = "Copy the folder to a local disk, and set backbone.path to the copy."
        return [Finding(name, "warn", found, remedy)]
    return [Finding(name, "ok", found)]


@dataclass(frozen=True)
class ReadSpeed:
    """What a short read of a file has shown."""

    bytes_per_second: float
    cached: bool | None
    """Whether it came out of the page cache; None where the system does not tell."""

    @property
    def described(self) -> str:
        """Speed and where the bytes came from."""
        origin = {
            True: "from the page cache, so the disk itself may be slower",
            False: "from the disk",
            None: "perhaps from the page cache",
        }
        return f"{self.bytes_per_second / MEGABYTE:,.0f} MB/s {origin[self.cached]}"


def measure_write(path: Path) -> float:
    """Bytes per second of writing `path`, up to 128 MiB or a second, flushed to the disk."""
    block = os.urandom(_BLOCK_BYTES)  # zeros would be stored as nothing by some file systems
    start = time.perf_counter()
    written = 0
    with path.open("wb", buffering=0) as file:
        while written < _PROBE_BYTES and time.perf_counter() - start < _PROBE_SECONDS:
            written += file.write(block)
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written / seconds


def measure_read(path: Path) -> ReadSpeed:
    """Speed of reading the first 128 MiB of `path`, or a second's worth of it."""
    buffer = bytearray(_BLOCK_BYTES)
    end = min(path.stat().st_size, _PROBE_BYTES)
    with path.open("rb", buffering=0) as file:
        cached = _in_page_cache(file.fileno(), end)
        start = time.perf_counter()
        done = 0
        while done < end and time.perf_counter() - start < _PROBE_SECONDS:
            done += file.readinto(buffer)
        seconds = time.perf_counter() - start
    return ReadSpeed(done / max(seconds, 1e-9), cached)


def _in_page_cache(descriptor: int, end: int) -> bool | None:
    """Whether most of the first `end` bytes are there without a disk being asked."""
    answers = []
    for offset in range(0, end, _BLOCK_BYTES):
        try:
            os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
            answers.append(True)
        except BlockingIOError:
            answers.append(False)
        except (OSError, AttributeError):
            return None
    return 2 * sum(answers) > len(answers)


@contextmanager
def _scratch_file(folder: Path) -> Iterator[Path]:
    path = folder / f".softprompt-doctor-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
