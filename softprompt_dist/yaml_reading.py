"""YAML as recipes have it: plain values, bounded in depth and in size, each key once.

PyYAML's safe loader runs no code, but it expands aliases without end, takes the last of two equal
keys without a word, and raises errors of many kinds for values it cannot make.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 1 << 18
_MAX_DEPTH = 32
_MAX_EXPANDED = 1 << 17
"""Values and characters of a document in which each alias is replaced by what it stands for."""
_MAX_NUMBER = 64
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def parse_yaml(text: str) -> Any:
    """The value that a YAML document stands for; None for an empty one.

    Raises:
        ValueError: it is not YAML, or too long, too deep, ambiguous, or unwritable; says where.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, and {MAX_BYTES:,} are read")
    try:
        loader = _BoundedLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


class _ImpossibleError(ValueError):
    """A value is not of the kind that its tag or its form says."""


class _BoundedLoader(yaml.SafeLoader):
    """Measures each node as it is made, when all below it are."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._measures: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and node not in self._measures:
            raise ValueError(f"an alias stands for what it is part of{_place(node)}")
        if not is_alias:
            self._measures[node] = self._measure(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, _ImpossibleError):
            raise
        except Exception as error:  # Python's own, such as of int() and date()
            kind = node.tag.rpartition(":")[2]
            raise _ImpossibleError(f"{node.value!r:.80} is no {kind}{_place(node)}") from error

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        """Size and depth, expanded."""
        below: list[yaml.Node] = []
        own = 1
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
            own += len(node.value)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            below = [each for pair in node.value for each in pair]
        else:
            below = node.value
        measures = [self._measures[each] for each in below]
        size = own + sum(size for size, _ in measures)
        depth = 1 + max((depth for _, depth in measures), default=0)
        if size > _MAX_EXPANDED or depth > _MAX_DEPTH:
            raise ValueError(f"its aliases make it too large{_place(node)}")
        return size, depth


def _check_scalar(node: yaml.ScalarNode) -> None:
    if found := _UNREADABLE.search(node.value):
        raise ValueError(
            f"a text has the character U+{ord(found[0]):04X}, which is none to read or write"
            f"{_place(node)}"
        )
    if node.tag in _NUMBERS and len(node.value) > _MAX_NUMBER:
        raise ValueError(f"a number has more than {_MAX_NUMBER} characters{_place(node)}")


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"a key is a list or a mapping{_place(key)}")
        if key.value in seen:
            raise ValueError(f"the key {key.value!r:.80} stands there twice{_place(key)}")
        seen.add(key.value)


def _place(node: yaml.Node) -> str:
    mark = node.start_mark
    return f" (line {mark.line + 1}, column {mark.column + 1})"
