"""Secrets are taken out of whatever people get to see: messages, logs, command lines, records."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

REDACTED = "<redacted>"

_LEAST_CHARACTERS = 8
"""A variable's value that is shorter is more likely a word of the message than a secret."""
# "tokens", "tokenizer" and "pad_token_id" are settings, not secrets.
_SECRET_KEY = re.compile(r"token(?!s\b|i[sz]|_id)|key|secret|passw|credential", re.IGNORECASE)
_NO_SECRET_KEY = re.compile(r"(path|file|dir|sock|folder)s?$", re.IGNORECASE)
# In running text "the key=..." is more often a setting's than a secret's.
_SECRET_KEY_IN_TEXT = re.compile(
    r"token(?!s\b|i[sz]|_id)|secret|passw|credential"
    r"|(?:api|access|account|auth|private|storage)[_-]?key",
    re.IGNORECASE,
)
# Each pattern begins at places that it passes once: a long text must not take the square of its
# length.
_ASSIGNED = re.compile(r"(?<=[\w.-])=[^\s'\",;)\]}]+")
_KEY_BEFORE = re.compile(r"[\w.-]+\Z")
_LONGEST_KEY = 128
_SHAPES = re.compile(
    r"(?<=://)[^/@\s'\"]+(?=@)"
    r"|(?<![A-Za-z0-9_-])(?:(?:hf|gh[oprsu])_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|(?:pypi-Ag|(?:glpat|xox[abprs]|sk-(?:proj|ant|svcacct|or))-)[A-Za-z0-9_-]{16,}"
    r"|sk[_-](?:[a-z0-9]+[_-]){0,3}[A-Za-z0-9]{16,}[A-Za-z0-9_-]*)"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
)


def redact_text(text: str) -> str:
    """`text` without what looks like a secret, or is one of this process's variables.

    `HF_TOKEN=x`, `https://user:x@host`, the usual shapes of access tokens, and the values of
    variables with names such as HF_TOKEN, AWS_SECRET_ACCESS_KEY and WANDB_API_KEY.
    """
    return _without(text, _secret_values())


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret-looking options and variables replaced, too."""
    redacted: list[str] = []
    next_is_secret = False
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        secret = is_secret_key(key)
        if next_is_secret and not argument.startswith("-"):
            redacted.append(REDACTED)
        elif equals and secret:
            redacted.append(f"{key}={REDACTED}")
        else:
            redacted.append(redact_text(argument))
        next_is_secret = secret and not equals and argument.startswith("--")
    return redacted


def is_secret_key(name: str) -> bool:
    """Whether a setting of this name is likely to hold a secret, not a place where one lies."""
    return bool(_SECRET_KEY.search(name)) and not _NO_SECRET_KEY.search(name)


def places_of_secrets(values: Mapping[str, Any], *, by_key: bool = False) -> list[str]:
    """Dotted names of the texts in `values`, and of the keys, that look like secrets.

    With `by_key`, of any text, too, that a key such as `api_key` stands for.
    """
    secrets = _secret_values()
    return [
        place
        for place, text in _texts(values, "", seen=set())
        if _without(text, secrets) != text
        or (by_key and text and is_secret_key(place.rpartition(".")[2]))
    ]


def redact_output() -> None:
    """From now on, redact what this process logs, and the traceback that it may end with."""
    sys.excepthook = _print_redacted
    if logging.getLogRecordFactory() is not _redacted_record:
        logging.setLogRecordFactory(_redacted_record)


def _secret_values() -> list[str]:
    """Of this process's variables; the longest first, for one may be a part of another."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _LEAST_CHARACTERS and is_secret_key(name)
    }
    return sorted(values, key=len, reverse=True)


def _without(text: str, secrets: Sequence[str]) -> str:
    for value in secrets:
        text = text.replace(value, REDACTED)
    return _ASSIGNED.sub(_without_value, _SHAPES.sub(REDACTED, text))


def _without_value(assigned: re.Match[str]) -> str:
    end = assigned.start()
    key = _KEY_BEFORE.search(assigned.string[max(0, end - _LONGEST_KEY) : end])
    is_secret = key is not None and _SECRET_KEY_IN_TEXT.search(key[0])
    return f"={REDACTED}" if is_secret else assigned[0]


def _texts(value: Any, place: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """All texts and keys below `value` with their places; what occurs in several, in the first."""
    if isinstance(value, str):
        yield place, value
        return
    if id(value) in seen or not isinstance(value, (Mapping, list, tuple)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        yield from ((f"a name in {place}" if place else "a name", str(key)) for key in value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, below in items:
        yield from _texts(below, f"{place}.{key}" if place else str(key), seen)


def _print_redacted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact_text(text), end="", file=sys.stderr, flush=True)


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        message = record.getMessage()
    except Exception:  # a format that does not go with its values: the handler says so
        return record
    redacted = redact_text(message)
    if redacted != message:
        record.msg, record.args = redacted, ()
    return record
