"""SuperGLUE as it is handed out: combined.zip, a zip for each task, or these unpacked."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

from softprompt_dist.data.rows import OpenFile, nearest, opener
from softprompt_dist.errors import DataError
from softprompt_dist.untrusted import open_regular

_OFFICIAL_NAMES = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
_ENDINGS = (".jsonl", ".jsonl.gz")


def superglue_files(
    path: Path, folder: str, named: dict[str, str | None]
) -> dict[str, tuple[str, OpenFile]]:
    """For each split that is there, where its rows are (for messages) and what opens them.

    Args:
        path: combined.zip, a task's zip, a folder of either layout, or the task's own folder.
        folder: the task's folder, such as `BoolQ`.
        named: split -> a file's name other than the official one, with or without its ending; what
            is named for one split is not taken for a second one.

    Raises:
        DataError: nothing of the task is there, or a file that is named is not.
    """
    origin, files = _files_of(path, folder)
    chosen: dict[str, str] = {}
    for split, name in named.items():
        if not name:
            continue
        file = _pick((name,), files)
        if file is None:
            raise DataError(
                f"task.source.{split} is {name!r}, but {path} has no such file of {folder}."
                f"{nearest(name, files)} It has {', '.join(sorted(files))}."
            )
        chosen[split] = file
    for split, official in _OFFICIAL_NAMES.items():
        file = _pick(official, files)
        if split not in chosen and file and file not in chosen.values():
            chosen[split] = file
    return {split: (f"{origin}{file}", files[file]) for split, file in chosen.items()}


def _pick(names: tuple[str, ...], files: dict[str, OpenFile]) -> str | None:
    candidates = [name + ending for name in names for ending in ("", *_ENDINGS)]
    return next((name for name in candidates if name in files), None)


def _files_of(path: Path, folder: str) -> tuple[str, dict[str, OpenFile]]:
    """The jsonl files of a task by name, and what stands before the name in messages."""
    if path.is_dir():
        if (path / folder).is_dir():
            return f"{folder}/", _in_folder(path / folder)
        if files := _in_folder(path):
            return f"{path.name}/", files
        zips = [path / f"{folder}.zip", path / "combined.zip"]
        path = next((file for file in zips if file.is_file()), path)
    if not path.is_file():
        raise DataError(
            f"task.source.path is {path}, but there is no zip and no folder {folder} there. Give "
            f"the official combined.zip or {folder}.zip, or the folder that has {folder}. Paths "
            f"start at {Path.cwd()}."
        )
    try:
        open_regular(path).close()
        files = _in_zip(path, folder)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(f"Cannot read {path}: {error}. Check that the zip is whole.") from error
    if not files:
        raise DataError(
            f"{path} has no jsonl files of {folder}. Give the official combined.zip or {folder}.zip"
        )
    return f"{path.name}:{folder}/", files


def _in_folder(folder: Path) -> dict[str, OpenFile]:
    files = [file for file in sorted(folder.iterdir()) if file.name.endswith(_ENDINGS)]
    return {file.name: opener(file) for file in files}


def _in_zip(zip_file: Path | bytes, folder: str) -> dict[str, OpenFile]:
    """Files of the task's folder; else of its zip inside this one; else those in no folder."""
    with _archive(zip_file) as archive:
        # Some programs of Windows write its separator, against the standard.
        members = {n: PurePosixPath(n.replace("\\", "/")) for n in archive.namelist()}
        rows = {name: path for name, path in members.items() if path.name.endswith(_ENDINGS)}
        chosen = {name: path for name, path in rows.items() if path.parent.name == folder}
        inner = next((name for name, path in members.items() if path.name == f"{folder}.zip"), None)
        if not chosen and inner is not None:
            return _in_zip(archive.read(inner), folder)
    chosen = chosen or {name: path for name, path in rows.items() if str(path.parent) == "."}
    return {path.name: _member_opener(zip_file, name) for name, path in chosen.items()}


def _member_opener(zip_file: Path | bytes, member: str) -> OpenFile:
    # What is opened keeps the zip's file open, and closes it.
    return lambda: _archive(zip_file).open(member)


def _archive(zip_file: Path | bytes) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(zip_file) if isinstance(zip_file, bytes) else zip_file)
