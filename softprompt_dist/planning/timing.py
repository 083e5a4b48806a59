"""Seconds of a step and of loading, from operations and bytes. Estimates: see `ASSUMPTIONS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cell, Workload
from softprompt_dist.backbone.memory_model import sharded_bytes, weight_bytes
from softprompt_dist.errors import ConfigError
from softprompt_dist.planning.machine import Machine
from softprompt_dist.planning.work import (
    Part,
    gather_bytes,
    offload_bytes,
    parts,
    recomputed_share,
    reduce_bytes,
)

EFFICIENCY = 0.5
"""Share of the peak that large matrix products reach in a whole step."""
_HIDDEN = 0.7
"""Share of the shorter of computing and gathering that the longer one hides."""
_LAUNCH_SECONDS = {"replicated": 0.5e-3, "zero3": 1.0e-3}
"""Python and launches for one block and pass; a device cannot be faster than it is told."""
_REDUCE_LATENCY_SECONDS = 100e-6
_CAST_GB_PER_SECOND = 2.0
"""fp32 to bf16, one rank, of what it reads."""
_QUANTIZE_GB_PER_SECOND = 0.5
"""Floating point to int8 or nf4, one rank, of what it reads."""

ASSUMPTIONS = (
    f"Matrix products reach {EFFICIENCY:.0%} of the peak, but never faster than weights are read.",
    "int8 and nf4 are brought back to numbers once forward and once backward, at the speed of the "
    "device's memory (bitsandbytes: half of it, and LLM.int8() multiplies half as fast forward).",
    f"Gathers run beside computing, which hides {_HIDDEN:.0%} of the shorter of the two.",
    f"Python takes {_LAUNCH_SECONDS['replicated'] * 1e3:g} ms for a block and pass "
    f"({_LAUNCH_SECONDS['zero3'] * 1e3:g} ms if sharded); a step is never shorter than that.",
    f"Loading: disk, conversion ({_CAST_GB_PER_SECOND:g} GB/s a rank to bf16, "
    f"{_QUANTIZE_GB_PER_SECOND:g} quantizing) and copies to the device overlap.",
)


@dataclass(frozen=True)
class Step:
    """One forward and backward pass with a micro-batch on every device, in seconds."""

    compute: float
    gather: float
    """Bringing blocks in, from other devices, the node's memory or its disk."""
    total: float


def estimate_step(
    architecture: Architecture, cell: Cell, workload: Workload, machine: Machine
) -> Step:
    """How long a step takes.

    Raises:
        ConfigError: the device does not compute in the cell's type.
    """
    forward = _pass_seconds(architecture, cell, workload, machine, backward=False)
    backward = _pass_seconds(architecture, cell, workload, machine, backward=True)
    again = recomputed_share(architecture, cell)
    num_blocks = architecture.num_layers + architecture.num_decoder_layers + 1
    launches = (2 + again) * num_blocks * _LAUNCH_SECONDS[cell.sharding]
    compute = max((1 + again) * forward + backward, launches)
    gather = _gather_seconds(architecture, cell, machine)
    exposed = (1 - _HIDDEN) * min(compute, gather) + gather / num_blocks
    return Step(
        compute=compute,
        gather=gather,
        total=max(compute, gather) + exposed + _reduce_seconds(architecture, workload, machine),
    )


def estimate_answer(
    architecture: Architecture, cell: Cell, workload: Workload, machine: Machine, positions: int
) -> float:
    """Seconds for one row of the longest, answered greedily, where all devices score.

    Args:
        architecture: of the backbone.
        cell: how it is held.
        workload: of training; its micro-batch does not count.
        machine: the devices.
        positions: that a device scores at a time.
    """
    rows = max(1, positions // (workload.num_positions(architecture) + workload.target_length))
    sizes = [cell.block_bytes(block) for block in architecture.blocks()]
    # An encoder reads once; a decoder-only model's every layer sees every token.
    decoding = sizes[architecture.num_layers if architecture.num_decoder_layers else 0 :]
    gather = _gather_seconds(architecture, cell, machine) / (2 * sum(sizes) - sum(sizes[-2:]))
    work = replace(workload, micro_batch=rows)
    reading = _pass_seconds(architecture, cell, work, machine, backward=False)
    token = max(
        sum(decoding) / (machine.gpu.memory_gb_per_second * 1e9),
        len(decoding) * _LAUNCH_SECONDS[cell.sharding],
        sum(decoding) * gather,
    )
    seconds = max(reading, sum(sizes) * gather) + workload.target_length * token
    return seconds / (rows * machine.cluster.num_gpus)


def estimate_loading(
    architecture: Architecture, cell: Cell, machine: Machine, *, converted: bool
) -> float:
    """Seconds to read, convert and copy the weights, after the processes have started.

    Args:
        architecture: of the model.
        cell: how it will be held.
        machine: its disk and links.
        converted: whether `softprompt convert` has written it in the cell's precision.
    """
    cluster = machine.cluster
    shards = cluster.num_shards(cell)
    stored = float(architecture.num_parameters * architecture.checkpoint_bytes_per_weight)
    if converted:
        stored = float(sharded_bytes(architecture, cell))
    # A node's ranks read the same files: from disk once, then from memory.
    share_of_node = min(1.0, cluster.gpus_per_node / shards)
    disk = stored * share_of_node / (machine.disk_gb_per_second * 1e9)
    conversion = 0.0 if converted else stored / shards / _conversion_speed(architecture, cell)
    copy = weight_bytes(architecture, cell, cluster) / (machine.gpu.host_gb_per_second * 1e9)
    return max(disk, conversion, copy)


def _conversion_speed(architecture: Architecture, cell: Cell) -> float:
    if cell.quantization != "none":
        return _QUANTIZE_GB_PER_SECOND * 1e9
    same = architecture.checkpoint_bytes_per_weight == cell.item_bytes
    return float("inf") if same else _CAST_GB_PER_SECOND * 1e9


def _pass_seconds(
    architecture: Architecture,
    cell: Cell,
    workload: Workload,
    machine: Machine,
    *,
    backward: bool,
) -> float:
    return sum(
        _part_seconds(part, cell, machine, backward=backward)
        for part in parts(architecture, workload)
    )


def _part_seconds(part: Part, cell: Cell, machine: Machine, *, backward: bool) -> float:
    peak = _peak_operations(cell, machine) * EFFICIENCY
    bandwidth = machine.gpu.memory_gb_per_second * 1e9
    attention = part.attention_operations * (2 if backward else 1)
    products = part.matrix_operations
    if cell.quantization == "llm_int8" and not backward:
        products *= 2
    weights = part.num_layers * sum(m.size for m in part.matrices) * cell.item_bytes
    return (
        max(products / peak, weights / bandwidth)
        + attention / peak
        + _dequantization_bytes(part, cell) / bandwidth
    )


def _dequantization_bytes(part: Part, cell: Cell) -> float:
    """Read as stored and written as numbers."""
    moved = sum(
        cell.matrix_bytes(m) + m.size * cell.item_bytes for m in part.matrices if cell.quantizes(m)
    )
    slow_library = cell.quantization in ("llm_int8", "nf4")
    return float(part.num_layers * moved * (2 if slow_library else 1))


def _peak_operations(cell: Cell, machine: Machine) -> float:
    if cell.dtype == "fp32":
        return machine.gpu.fp32_tflops * 1e12
    if machine.gpu.bf16_tflops is None:
        raise ConfigError("This GPU has no bf16: plan with dtype fp32.")
    return machine.gpu.bf16_tflops * 1e12


def _gather_seconds(architecture: Architecture, cell: Cell, machine: Machine) -> float:
    received = gather_bytes(architecture, cell, machine.cluster)
    seconds = received / (machine.gather_gb_per_second(cell) * 1e9)
    copied = offload_bytes(architecture, cell, machine.cluster)
    seconds += copied / (machine.gpu.host_gb_per_second * 1e9)
    if cell.offload == "nvme":
        read = copied * machine.cluster.gpus_per_node
        seconds += read / (machine.disk_gb_per_second * 1e9)
    return seconds


def _reduce_seconds(architecture: Architecture, workload: Workload, machine: Machine) -> float:
    if machine.cluster.num_gpus == 1:
        return 0.0
    received = reduce_bytes(architecture, workload, machine.cluster)
    return _REDUCE_LATENCY_SECONDS + received / (machine.reduce_gb_per_second * 1e9)
