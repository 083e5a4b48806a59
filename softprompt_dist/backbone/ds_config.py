"""What tuning and adaptation check alike of a ds_config."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from softprompt_dist.errors import ConfigError
from softprompt_dist.redaction import places_of_secrets
from softprompt_dist.untrusted import parse_json, read_bounded

_MAX_BYTES = 1 << 20
BATCH_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
}
"""Settings of a ds_config that belong to every recipe -> their names there."""


def read_ds_object(
    path: str | Path, problems_of: Callable[[dict[str, Any]], Sequence[str]]
) -> dict[str, Any]:
    """The JSON object in a file, unless `problems_of` finds any; all are named in one message.

    Raises:
        ConfigError: missing, no JSON, no object, or with problems.
    """
    try:
        values = parse_json(read_bounded(Path(path), _MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read ds_config {path}: {error}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"ds_config {path} must be a JSON object.")
    problems = [
        f"has what looks like a password or an access token in {place}. DeepSpeed prints its "
        "config: remove it, and give it to the program that needs it in the environment."
        for place in places_of_secrets(values, by_key=True)
    ] or problems_of(values)
    if problems:
        raise ConfigError(f"ds_config {path}\n" + "\n".join(f"  - {p}" for p in problems))
    return values


def misplaced(
    values: Mapping[str, Any], belongs_to_recipe: Mapping[str, str], sections: Sequence[str]
) -> list[str]:
    """Problems with keys: of the recipe's settings, with "auto", and like a section but for typos.

    Args:
        values: the ds_config.
        belongs_to_recipe: key -> what the recipe calls it.
        sections: the keys that there may be.
    """
    problems = [
        f"sets {key!r}, which belongs to the recipe ({home}). Remove it from the JSON."
        for key, home in belongs_to_recipe.items()
        if key in values
    ]
    problems += [
        f'sets {name} to "auto", which only the Hugging Face Trainer fills in. Remove it: '
        "it is worked out here."
        for name in _automatic(values)
        if name not in belongs_to_recipe
    ]
    problems += [
        f"sets {key!r}, which is unknown.{similar_key(key, sections)}"
        for key in values
        if similar_key(key, sections)
    ]
    return problems


def quoted_stage(zero: Mapping[str, Any]) -> str | None:
    """The `stage` of a `zero_optimization` as JSON, if it is no whole number (nor "auto")."""
    stage = zero.get("stage", 0)
    is_number = isinstance(stage, int) and not isinstance(stage, bool)
    return None if is_number or stage == "auto" else json.dumps(stage)


def check_zero(zero: dict[str, Any]) -> None:
    """Whether DeepSpeed knows every key and value of a `zero_optimization`.

    Raises:
        ConfigError: it does not; the nearest key is named.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        known = [f.alias or n for n, f in DeepSpeedZeroConfig.model_fields.items()]
        problems = [
            f"\n  - zero_optimization.{reason_of(e)}{similar_key(str(e['loc'][-1]), known)}"
            for e in error.errors()
        ]
        raise ConfigError("ds_config: DeepSpeed refuses" + "".join(problems)) from error


def reason_of(problem: Any) -> str:
    """One of pydantic's errors with its key and value, which its own words leave out."""
    message = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    name = ".".join(map(str, problem["loc"]))
    return f"{name} is {problem['input']!r}: {message}." if name else f"{message}."


def similar_key(key: str, known: Sequence[str]) -> str:
    """Words that name the known key nearest to an unknown one; nothing where there is none."""
    close = [] if key in known else difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _automatic(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _automatic(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key
