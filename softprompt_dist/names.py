"""The one rule for names that become parts of paths, and the one way to make paths of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from softprompt_dist.errors import SoftpromptError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of runs, stages, folders of tasks, shards: no separator, no hidden file, nothing for a shell."""
RULE = "a name has 1 to 64 letters, digits, '.', '-' and '_', and begins with a letter or a digit"

_MAX_LABEL_CHARACTERS = 200
_LONGEST_FOLDER = 48
"""A split or a number comes behind it."""


def is_name(text: object) -> bool:
    """Whether `text` keeps the rule, to its last character."""
    return isinstance(text, str) and NAME.fullmatch(text) is not None


def checked_name(text: str) -> str:
    """`text`, which keeps the rule.

    Raises:
        ValueError: it does not.
    """
    if not is_name(text):
        raise ValueError(f"{RULE}. Choose another one")
    return text


def checked_label(text: str) -> str:
    """`text`, which people read: any characters, but on one line, and not without end.

    Raises:
        ValueError: it is empty, too long, or has control characters.
    """
    if not 0 < len(text) <= _MAX_LABEL_CHARACTERS or not text.isprintable():
        raise ValueError(
            f"it must be 1 to {_MAX_LABEL_CHARACTERS} printable characters on one line"
        )
    return text


def name_of(label: str) -> str:
    """A label as names of folders have it; labels that differ may have the same one."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", label).lstrip("._-")
    return kept[:_LONGEST_FOLDER].rstrip(".-") or "task"


def path_inside(folder: Path, *names: str, error: Callable[[str], SoftpromptError]) -> Path:
    """`folder` and names below it; what `error` makes of the message where that leads out of it.

    Raises:
        SoftpromptError: `error`, when a name breaks the rule, or is a symbolic link.
    """
    path = folder
    for name in names:
        if not is_name(name):
            raise error(f"{name!r:.100} cannot be a file or folder in {folder}: {RULE}. Rename it.")
        path = path / name
        if path.is_symlink():
            raise error(
                f"{path} is a symbolic link, which may lead out of {folder}. Put the files "
                "themselves there, or name another folder."
            )
    return path


Name = Annotated[str, AfterValidator(checked_name)]
"""A setting that is a name."""
Label = Annotated[str, AfterValidator(checked_label)]
"""A setting that people read; `name_of` makes a name of it."""
