"""The folder for what is fetched, converted or built once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where fetched, converted and built files are kept; made if absent.

    `$SOFTPROMPT_CACHE` if set, else `softprompt-dist` in `$XDG_CACHE_HOME` or in `~/.cache`.
    """
    chosen = os.environ.get("SOFTPROMPT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen).expanduser() if chosen else Path(home) / "softprompt-dist"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
