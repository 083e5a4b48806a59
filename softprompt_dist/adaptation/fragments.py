"""Where DeepSpeed keeps the fp32 weights: which stretch of which parameter lies in which tensor.

ZeRO hands an optimizer flat tensors, each the stretches that one rank owns of many parameters one
behind the other. What needs whole parameters (row and column statistics, a root mean square, a
checkpoint) needs to know what is where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter in a flat tensor of this rank; of size 0 where it has none."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    first: int
    """Index of its first element in the flattened parameter."""
    start: int
    """Index of its first element in the flat tensor."""
    size: int

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in a tensor that is laid out like the flat one, as a 1-D view."""
        return flat.view(-1)[self.start : self.start + self.size]


@dataclass(frozen=True)
class Layout:
    """The flat fp32 tensors of this rank; every parameter is named in just one, on all ranks."""

    flats: dict[Tensor, list[Fragment]]
    is_sharded: bool
    """Whether the ranks hold different stretches, or each everything."""

    def fragments(self) -> Iterator[tuple[Tensor, Fragment]]:
        """Every fragment with the flat tensor in which it lies."""
        for flat, fragments in self.flats.items():
            for fragment in fragments:
                yield flat, fragment

    def tensors(self, values_of: Callable[[Tensor], Tensor]) -> dict[str, ShardedTensor]:
        """Name -> tensor of what lies like the weights do.

        Args:
            values_of: flat tensor of weights -> tensor of the same layout, such as a moment.
        """
        return {
            fragment.name: sharded(fragment, fragment.of(values_of(flat)), self.is_sharded)
            for flat, fragment in self.fragments()
        }

    def weights(self) -> dict[str, ShardedTensor]:
        """Name -> fp32 weight."""
        return self.tensors(lambda flat: flat.data)


def sharded(fragment: Fragment, values: Tensor, is_sharded: bool) -> ShardedTensor:
    """`values` as this rank's part of a tensor that is shaped like the fragment's parameter."""
    pieces = (Piece(fragment.first, values),) if fragment.size else ()
    return ShardedTensor(fragment.shape, pieces, is_replicated=not is_sharded)


def layout_of(engine: Any, names: Mapping[int, str]) -> Layout:
    """Of a DeepSpeed engine that trains all parameters of its module, at any ZeRO stage.

    Args:
        engine: the engine.
        names: id of every parameter -> its name in a checkpoint.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return Layout(_stage_3(optimizer, names), is_sharded=True)
    if engine.zero_optimization_stage() > 0:
        return Layout(_stages_1_and_2(optimizer, names), is_sharded=True)
    return Layout({p: [_whole(p, names[id(p)])] for p in engine.module.parameters()}, False)


def _whole(parameter: nn.Parameter, name: str) -> Fragment:
    return Fragment(name, tuple(parameter.shape), 0, 0, parameter.numel())


def _stages_1_and_2(optimizer: Any, names: Mapping[int, str]) -> dict[Tensor, list[Fragment]]:
    # Stage 1 that sums bf16 gradients in fp32 is another class of DeepSpeed's, with other names.
    if not hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups = zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
        return {flat: [_mapped(p, names[id(p)]) for p in group] for flat, group in groups}
    from deepspeed import comm

    found = {}
    for flat, group, whole, dp_group in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.bit16_groups,
        optimizer.bit16_groups_flat,
        optimizer.real_dp_process_group,
        strict=True,
    ):
        first = flat.numel() * comm.get_rank(dp_group)
        part = range(first, first + flat.numel())
        found[flat] = [_overlap(p, names[id(p)], _offset(p, whole), part) for p in group]
    return found


def _offset(parameter: nn.Parameter, whole: Tensor) -> int:
    """Of a parameter in the flat tensor that it is a view of, in elements.

    By address: DeepSpeed's own mapping does not know the order of `round_robin_gradients`.
    """
    return (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()


def _overlap(parameter: nn.Parameter, name: str, offset: int, part: range) -> Fragment:
    """What of a parameter lies in this rank's part of the flat tensor of all."""
    start, stop = max(offset, part.start), min(offset + parameter.numel(), part.stop)
    shape = tuple(parameter.shape)
    if start >= stop:
        return Fragment(name, shape, 0, 0, 0)
    return Fragment(name, shape, start - offset, start - part.start, stop - start)


def _mapped(parameter: Any, name: str) -> Fragment:
    mapping, shape = parameter._hp_mapping, tuple(parameter.shape)  # noqa: SLF001 - DeepSpeed's
    if mapping is None:
        return Fragment(name, shape, 0, 0, 0)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, shape, here.start, there.start, there.numel)


def _stage_3(optimizer: Any, names: Mapping[int, str]) -> dict[Tensor, list[Fragment]]:
    from deepspeed import comm

    rank = comm.get_rank(optimizer.dp_process_group)
    found = {}
    groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    for flat, group in groups:
        fragments, start = [], 0
        for parameter in group:
            part = parameter.ds_tensor.ds_numel  # the last ranks' parts are padded
            first = min(part * rank, parameter.ds_numel)
            size = min(part, parameter.ds_numel - first)
            name, shape = names[id(parameter)], tuple(parameter.ds_shape)
            fragments.append(Fragment(name, shape, first, start, size))
            start += part
        found[flat] = fragments
    return found


def publish_weights(engine: Any) -> None:
    """All ranks: let the model compute with what was written into the fp32 weights."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
