"""What the devices of a run can multiply per second: the whole that MFU is a share of."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from softprompt_dist.parallel import ranks
from softprompt_dist.planning.machine import gpu_of_device

_SECONDS_OF_MEASURING = 0.3
_CUDA_SIZE, _CPU_SIZE = 8192, 1024
"""Sides of the squares that are multiplied: large enough to reach the peak."""


@dataclass(frozen=True)
class Peak:
    """Operations per second of all ranks' devices together."""

    operations_per_second: float
    source: str
    """Where the number is from, for people."""


def find_peak(dtype: torch.dtype) -> Peak:
    """All ranks: the vendors' figure where each device has one, else what a product reaches now.

    Args:
        dtype: of the matrix products, float32 or bfloat16.
    """
    name = _device_name()
    listed = listed_peak(name, dtype)
    if all(peak is not None for peak in ranks.gather_objects(listed)):
        source = f"the vendor's figure for {name}"
    else:
        listed = None
        source = f"measured on {name}"
    size = _CUDA_SIZE if ranks.device().type == "cuda" else _CPU_SIZE
    own = listed or measured_peak(dtype, size=size, seconds=_SECONDS_OF_MEASURING)
    summed = torch.tensor(own, dtype=torch.float64, device=ranks.device())
    total = float(ranks.all_reduce_sum(summed))
    per_device = total / ranks.world_size() / 1e12
    text = f"MFU is a share of {per_device:.4g} TFLOP/s per rank in {_short(dtype)}, {source}."
    return Peak(total, text)


def listed_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations per second by the planner's table of GPUS; None where it has no such figure.

    Args:
        device_name: as `torch.cuda.get_device_name` has it.
        dtype: of the matrix products. float32 has no figure where torch may use TF32 for it.
    """
    gpu = gpu_of_device(device_name)
    if gpu is None:
        return None
    if dtype == torch.bfloat16:
        return None if gpu.bf16_tflops is None else gpu.bf16_tflops * 1e12
    uses_tf32 = torch.get_float32_matmul_precision() != "highest"
    return None if uses_tf32 else gpu.fp32_tflops * 1e12


def measured_peak(dtype: torch.dtype, *, size: int, seconds: float) -> float:
    """Operations per second of the best of many products of square matrices on this rank's device.

    Args:
        dtype: of the matrices.
        size: rows of the matrices.
        seconds: to try for; at least one product is made.
    """
    # A generator of its own: what is measured must not change what a run draws.
    generator = torch.Generator(ranks.device())
    square = torch.randn(size, size, device=ranks.device(), generator=generator).to(dtype)
    torch.mm(square, square)
    end, shortest = time.monotonic() + seconds, float("inf")
    while shortest == float("inf") or time.monotonic() < end:
        shortest = min(shortest, _seconds_of_product(square))
    return 2 * size**3 / shortest


def _seconds_of_product(square: torch.Tensor) -> float:
    if square.device.type != "cuda":
        start = time.perf_counter()
        torch.mm(square, square)
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    torch.mm(square, square)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _device_name() -> str:
    device = ranks.device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))
