"""Batch scripts: where they lie, and what they and the recipe together ask Slurm for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from softprompt_dist.errors import ConfigError

SETTINGS = "env.sh"
"""What all scripts source; a folder with this file is one of batch scripts."""
_SHORT = {"N": "nodes", "n": "ntasks", "t": "time", "G": "gpus", "p": "partition", "A": "account"}
_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_WARNING = re.compile(r"[^@]+@(\d+)")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def scripts_folder(chosen: str | None) -> Path:
    """The recipe's folder of batch scripts, else ./slurm, else the ones of this package.

    Raises:
        ConfigError: the recipe's is none.
    """
    if chosen is not None:
        folder = Path(chosen).absolute()
        if not (folder / SETTINGS).is_file():
            raise ConfigError(
                f"scripts is {chosen!r}, but there is no {folder / SETTINGS}. Copy the batch "
                f"scripts from {_packaged()} there, or leave `scripts` out."
            )
        return folder
    here = Path("slurm").absolute()
    return here if (here / SETTINGS).is_file() else _packaged()


def _packaged() -> Path:
    package = Path(str(resources.files("softprompt_dist")))
    installed = package / "batch_scripts"
    return installed if installed.is_dir() else package.parent / "slurm"


def script_options(script: Path) -> dict[str, str]:
    """What the `#SBATCH` lines at the head of a script say, by long names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the batch script {script}: {error}") from error
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            break  # Slurm, too, stops reading at the first command
        if line.startswith("#SBATCH"):
            found |= _options_in(shlex.split(line.removeprefix("#SBATCH"), comments=True))
    return found


def merged_options(*layers: Mapping[str, Any]) -> dict[str, str]:
    """Options of sbatch, later layers on top; null and false take an option away.

    One task runs on each GPU, so `gpus-per-node` without `ntasks-per-node` decides that, too.
    """
    merged: dict[str, str] = {}
    for layer in layers:
        gpus = str(layer.get("gpus-per-node") or "").rpartition(":")[2]
        if gpus.isdecimal() and not layer.keys() & {"ntasks-per-node", "ntasks"}:
            merged["ntasks-per-node"] = gpus
        for name, value in layer.items():
            if value is None or value is False:
                merged.pop(name, None)
            else:
                merged[name] = "" if value is True else str(value)
    return merged


def tasks_of(options: Mapping[str, str]) -> tuple[int, int] | None:
    """Nodes of a job and tasks on each, one a GPU; None where they cannot be told."""
    nodes = _number(options.get("nodes", "1"))
    total = _number(options.get("ntasks", ""))
    per_node = _number(options.get("ntasks-per-node", "" if "ntasks" in options else "1"))
    if nodes and "ntasks" in options:
        per_node = total // nodes if total and total % nodes == 0 else None
    return (nodes, per_node) if nodes and per_node else None


def gpus_per_node(options: Mapping[str, str]) -> int | None:
    """What `gpus-per-node` or `gres` asks for; None where neither does."""
    asked = options.get("gpus-per-node")
    if asked is None:
        generic = [each for each in options.get("gres", "").split(",") if each.startswith("gpu")]
        asked = generic[0].removeprefix("gpu") if generic else None
    if asked is None:
        return None
    number = asked.rpartition(":")[2]
    return int(number) if number.isdecimal() else 1


def time_limit_seconds(text: str | None) -> int | None:
    """Slurm's own notation: minutes, minutes:seconds, h:m:s, d-h, d-h:m, d-h:m:s; None if none."""
    found = _DURATION.fullmatch(text or "")
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (_HOUR, _MINUTE, 1) if days or len(numbers) == 3 else (_MINUTE, 1)
    own = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return int(days or 0) * _DAY + own


def signal_lead_seconds(text: str | None) -> int | None:
    """How long before its end a job is warned, by `signal` (B:USR1@300); None if it is not."""
    found = _WARNING.fullmatch(text or "")
    return int(found[1]) if found else None


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _options_in(words: list[str]) -> dict[str, str]:
    """Long names and values of a line's words."""
    found: dict[str, str] = {}
    for number, word in enumerate(words):
        following = words[number + 1] if number + 1 < len(words) else "-"
        if word.startswith("--"):
            name, is_assigned, value = word[2:].partition("=")
            own = not is_assigned and not following.startswith("-")
            found[name] = following if own else value
        elif re.fullmatch(r"-[A-Za-z].*", word):
            name = _SHORT.get(word[1], word[1])
            found[name] = word[2:] or ("" if following.startswith("-") else following)
    return found
