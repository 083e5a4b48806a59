"""Counts what torch.distributed is asked to move, whoever asks: DeepSpeed, we, torch itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_GATHERS = ("all_gather_into_tensor", "all_gather", "_all_gather_base", "all_gather_coalesced")
_OTHERS = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "_reduce_scatter_base",
    "broadcast",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "all_to_all",
    "all_to_all_single",
)


@dataclass(frozen=True)
class Call:
    """One collective."""

    name: str
    members: tuple[int, ...]
    """Ranks that take part."""
    num_bytes: int
    """Of the largest thing handed over: for a gather, what all ranks' parts come to."""

    @property
    def is_gather(self) -> bool:
        return self.name in _GATHERS

    @property
    def received_bytes(self) -> int:
        """What other ranks held of a gathered tensor."""
        return self.num_bytes - self.num_bytes // len(self.members)


@dataclass
class Record:
    """Collectives since the last `clear`."""

    calls: list[Call] = field(default_factory=list)

    def gathered_bytes(self) -> int:
        return sum(call.received_bytes for call in self.calls if call.is_gather)


@contextmanager
def recorded() -> Iterator[Record]:
    """Record every collective; to be entered before DeepSpeed looks the functions up."""
    record = Record()
    originals = {}
    for name in (*_GATHERS, *_OTHERS):
        if hasattr(distributed_c10d, name):
            originals[name] = getattr(distributed_c10d, name)
            _replace(name, _recording(name, originals[name], record))
    try:
        yield record
    finally:
        for name, function in originals.items():
            _replace(name, function)


def _replace(name: str, function: Callable[..., Any]) -> None:
    for module in (dist, distributed_c10d):
        if hasattr(module, name):
            setattr(module, name, function)


def _recording(name: str, function: Callable[..., Any], record: Record) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def call(*arguments: Any, **options: Any) -> Any:
        values = signature.bind(*arguments, **options).arguments
        members = tuple(dist.get_process_group_ranks(values.get("group") or dist.group.WORLD))
        record.calls.append(Call(name, members, max(map(_num_bytes, values.values()))))
        return function(*arguments, **options)

    return call


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return 0
