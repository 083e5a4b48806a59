"""Damaged samples: bits, bytes, slices, words and whole values changed, all from one seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[Random, bytes], bytes]

WORDS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\r", b"\n\n", b"\t", b'"',
    b"'", b"{", b"}", b"[", b"]", b":", b": ", b",", b"- ", b"? ", b"&a ", b"*a", b"<<: *a",
    b"!!bool ", b"!!timestamp x", b"!!python/object/apply:os.system [id]", b"---\n", b"...",
    b"%YAML 9.9\n", b"|", b"null", b"true", b"NaN", b"-Infinity", b".inf", b".nan", b"1e999",
    b"-1", b"0", b"0x_", b"1:99:0", b"9" * 400, b"9" * 5000, b"2026-13-45", b"\\ud800",
    b"\\u0000", b"../../x", b"/dev/zero", b"$(id)", b";rm -rf x", b"`id`", b"[" * 2000,
    b'{"a":' * 2000, b"a" * 3000, b"\x1f\x8b", b"PK\x03\x04", b"cos\nsystem\n(S'id'\ntR.",
    b"hf_abcdefghijklmnopqrstuv", b"https://u:p@example.org/x",
]  # fmt: skip
EVIL: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**400, -(10**30), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "a" * 300, "\ud800", "\0", "\n", "../../x", "/etc/passwd",
    "..", ".", "a/b", ";id", "$(id)", "x\ny", [], {}, [[]], [None], {"": None}, {"a": {"b": []}},
    "é☃",
]  # fmt: skip


def mutate_bytes(chosen: Random, sample: bytes) -> bytes:
    """One to four changes anywhere."""
    for _ in range(chosen.choice((1, 1, 1, 2, 3, 4))):
        sample = chosen.choice(_CHANGES)(chosen, sample)
    return sample


def mutate_value(chosen: Random, value: Any) -> Any:
    """A JSON value in which one to three places are something else."""
    value = json.loads(json.dumps(value))
    for _ in range(chosen.choice((1, 1, 2, 3))):
        value = _changed(chosen, value)
    return value


def mutate_json(chosen: Random, sample: bytes) -> bytes:
    """JSON with other values, other bytes, or both."""
    if chosen.random() < 0.6:
        sample = json.dumps(mutate_value(chosen, json.loads(sample))).encode()
        if chosen.random() < 0.8:
            return sample
    return mutate_bytes(chosen, sample)


def mutate_lines(chosen: Random, sample: bytes) -> bytes:
    """JSON lines of which one is another; all others stay readable."""
    lines = sample.splitlines()
    place = chosen.randrange(len(lines))
    lines[place] = mutate_json(chosen, lines[place])
    return b"\n".join(lines)


def mutate_safetensors(chosen: Random, sample: bytes) -> bytes:
    """A safetensors file: its header as JSON, the length before it, or any of its bytes."""
    kind = chosen.random()
    if kind < 0.35:
        return mutate_bytes(chosen, sample)
    length = int.from_bytes(sample[:8], "little")
    header, data = json.loads(sample[8 : 8 + length]), sample[8 + length :]
    own = header.get("__metadata__", {}).get("softprompt")
    if kind > 0.65 and own is not None:
        header["__metadata__"]["softprompt"] = mutate_json(chosen, own.encode()).decode(
            "utf-8", "replace"
        )
    else:
        header = mutate_value(chosen, header)
    text = json.dumps(header).encode()
    lie = chosen.choice((0, 0, 0, 0, 1, -1, 8, 2**20, 2**40, -length))
    shown = max(0, min(2**64 - 1, len(text) + lie))
    return shown.to_bytes(8, "little") + text + data


def _changed(chosen: Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or chosen.random() < 0.15:
        return chosen.choice(EVIL)
    if isinstance(value, list):
        place = chosen.randrange(len(value))
        return [*value[:place], _changed(chosen, value[place]), *value[place + 1 :]]
    key = chosen.choice(list(value))
    action = chosen.random()
    if action < 0.12:
        return {name: below for name, below in value.items() if name != key}
    if action < 0.24:
        name = chosen.choice((key + "x", "", "../x", "\ud800", key.upper(), "__class__"))
        return {name if old == key else old: below for old, below in value.items()}
    return value | {key: _changed(chosen, value[key])}


def _place(chosen: Random, sample: bytes) -> int:
    return chosen.randint(0, len(sample))


def _slice(chosen: Random, sample: bytes) -> tuple[int, int]:
    first = _place(chosen, sample)
    return first, min(len(sample), first + chosen.choice((1, 2, 4, 8, 32, 200)))


def _flip_bit(chosen: Random, sample: bytes) -> bytes:
    if not sample:
        return sample
    place = chosen.randrange(len(sample))
    changed = sample[place] ^ (1 << chosen.randrange(8))
    return sample[:place] + bytes([changed]) + sample[place + 1 :]


def _set_byte(chosen: Random, sample: bytes) -> bytes:
    place = _place(chosen, sample)
    return sample[:place] + bytes([chosen.randrange(256)]) + sample[place + 1 :]


def _truncate(chosen: Random, sample: bytes) -> bytes:
    return sample[: _place(chosen, sample)]


def _delete(chosen: Random, sample: bytes) -> bytes:
    first, last = _slice(chosen, sample)
    return sample[:first] + sample[last:]


def _repeat(chosen: Random, sample: bytes) -> bytes:
    first, last = _slice(chosen, sample)
    return sample[:last] + sample[first:last] * chosen.choice((1, 2, 50)) + sample[last:]


def _move(chosen: Random, sample: bytes) -> bytes:
    first, last = _slice(chosen, sample)
    piece, rest = sample[first:last], sample[:first] + sample[last:]
    place = _place(chosen, rest)
    return rest[:place] + piece + rest[place:]


def _insert_word(chosen: Random, sample: bytes) -> bytes:
    place = _place(chosen, sample)
    return sample[:place] + chosen.choice(WORDS) + sample[place:]


def _overwrite_word(chosen: Random, sample: bytes) -> bytes:
    place, word = _place(chosen, sample), chosen.choice(WORDS)
    return sample[:place] + word + sample[place + len(word) :]


def _replace_token(chosen: Random, sample: bytes) -> bytes:
    """A whole word or number of the sample becomes another of it, or an evil one."""
    tokens = sample.split(chosen.choice((b" ", b",", b":", b"\n", b'"')))
    if len(tokens) < 2:
        return _insert_word(chosen, sample)
    old = chosen.choice(tokens)
    return sample.replace(old, chosen.choice((*tokens[:8], *WORDS)), 1) if old else sample


_CHANGES: Sequence[Mutate] = (
    _flip_bit, _flip_bit, _set_byte, _truncate, _delete, _repeat, _move, _insert_word, _insert_word,
    _overwrite_word, _replace_token, _replace_token,
)  # fmt: skip
