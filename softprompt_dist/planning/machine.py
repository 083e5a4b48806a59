"""What a machine can do per second. Vendors' numbers, and what one can count on of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from softprompt_dist.backbone.cell import Cell, Cluster
from softprompt_dist.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One device. Speeds are peaks: dense tensor cores, no sparsity."""

    memory_gb: float
    """Of 10^9 bytes, as the driver reports it."""
    bf16_tflops: float | None
    """None where the device has no bf16."""
    fp32_tflops: float
    """Without TF32, which torch leaves off."""
    memory_gb_per_second: float
    link_gb_per_second: float
    """What one device receives from the others of its node while all do."""
    host_gb_per_second: float
    """Between the node's memory and one device."""


GPUS = {
    "a100-40": Gpu(42.3, 312, 19.5, 1555, 235, 20),
    "a100-80": Gpu(85.0, 312, 19.5, 2039, 235, 20),
    "h100": Gpu(84.9, 989, 67, 3350, 360, 45),
    "h200": Gpu(150.0, 989, 67, 4800, 360, 45),
    "v100-16": Gpu(16.9, None, 15.7, 900, 120, 11),
    "v100-32": Gpu(34.0, None, 15.7, 900, 120, 11),
    "t4": Gpu(15.6, None, 8.1, 320, 8, 11),
    "l4": Gpu(23.6, 121, 30, 300, 18, 20),
    "l40s": Gpu(47.6, 362, 91, 864, 18, 20),
    "a10": Gpu(23.6, 125, 31, 600, 18, 20),
    "rtx3090": Gpu(25.3, 71, 35, 936, 10, 20),
    "rtx4090": Gpu(25.2, 165, 82, 1008, 18, 20),
}
"""SXM boards where there are several; A100 and up, V100: NVLink; the rest: PCIe."""
_DEVICES = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-SXM2-32GB": "v100-32",
    "Tesla T4": "t4",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10": "a10",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
"""A driver's whole name of a device -> its name above. Whole: an `H100 PCIe`, an `A10G` or
a slice of an H100 is slower than the device whose name it begins with."""
NETWORK_GB_PER_SECOND = 22.0
DEFAULT_GPU = "a100-40"


@dataclass(frozen=True)
class Machine:
    """The nodes that a plan is made for."""

    gpu: Gpu
    cluster: Cluster
    network_gb_per_second: float = NETWORK_GB_PER_SECOND
    """What one device receives from other nodes while all do; 22 is 200 Gb/s for each."""
    disk_gb_per_second: float = 2.0
    """One node reads."""
    host_memory_gb: float | None = None
    """Of one node; None: not checked."""

    def gather_gb_per_second(self, cell: Cell) -> float:
        """The slowest link on the way of a gathered block."""
        if self.cluster.nodes > 1 and cell.shard_group == "world":
            return min(self.gpu.link_gb_per_second, self.network_gb_per_second)
        return self.gpu.link_gb_per_second

    @property
    def reduce_gb_per_second(self) -> float:
        """The slowest link between any two ranks."""
        several = self.cluster.nodes > 1
        network = self.network_gb_per_second if several else float("inf")
        return min(self.gpu.link_gb_per_second, network)


def gpu_of_device(device_name: str) -> Gpu | None:
    """The device that `torch.cuda.get_device_name` calls so; None where there are no numbers."""
    name = _DEVICES.get(device_name)
    return GPUS[name] if name else None


def gpu_named(name: str) -> Gpu:
    """The device of that name.

    Raises:
        ConfigError: not listed; the nearest is named.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    begin_so = [known for known in GPUS if known.startswith(name.lower())]
    close = begin_so or difflib.get_close_matches(name.lower(), GPUS, n=1)
    nearest = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ConfigError(
        f"There are no numbers for GPU {name!r}.{nearest} Known: {', '.join(GPUS)}. For another, "
        "give the nearest and set --gpu-memory, --gpu-tflops and --link-gb-per-second."
    )
