"""How a backbone is held, what it is given, and on how many devices: the memory model's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from softprompt_dist.backbone.architecture import Architecture, Matrix
from softprompt_dist.config import BackboneConfig

ITEM_BYTES = {"fp32": 4, "bf16": 2}
_SCALE_BYTES = 4
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""bitsandbytes with double quantization: an 8-bit scale for 64 weights, an fp32 for 256 scales."""


@dataclass(frozen=True)
class Cell:
    """How a backbone is held; names and values are those of the recipe's `backbone` section."""

    sharding: Literal["replicated", "zero3"] = "replicated"
    dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["none", "int8", "llm_int8", "nf4"] = "none"
    quantized_layers: Literal["blocks", "blocks_without_wo"] = "blocks"
    activation_checkpointing: str = "none"
    offload: Literal["none", "cpu", "nvme"] = "none"
    shard_group: Literal["world", "node"] = "world"

    @classmethod
    def of(cls, config: BackboneConfig) -> Cell:
        """The cell that a recipe's section asks for."""
        values = config.model_dump()
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    @property
    def item_bytes(self) -> int:
        """Of one number of the activations."""
        return ITEM_BYTES[self.dtype]

    def matrix_bytes(self, matrix: Matrix) -> int:
        """A stored weight, with its scales where it is quantized."""
        if not self.quantizes(matrix):
            return matrix.size * self.item_bytes
        if self.quantization == "nf4":
            return round(matrix.size * _NF4_BYTES)
        return matrix.size + matrix.num_rows * _SCALE_BYTES

    def quantizes(self, matrix: Matrix) -> bool:
        """Whether the weight is stored in fewer bits than it is computed with."""
        spared = {"head"}
        if self.quantized_layers == "blocks_without_wo":
            spared.add("feed_forward_out")
        return self.quantization != "none" and matrix.role not in spared

    def block_bytes(self, block: Sequence[Matrix]) -> int:
        """A block as it is stored and, under ZeRO-3, gathered."""
        return sum(map(self.matrix_bytes, block))


@dataclass(frozen=True)
class Workload:
    """The tensors of one forward and backward pass."""

    micro_batch: int = 4
    prompt_length: int = 100
    input_length: int = 512
    target_length: int = 8
    dropout: float = 0.0

    def num_positions(self, architecture: Architecture) -> int:
        """S: prompt and input; the target stands behind them in a decoder-only model."""
        target = 0 if architecture.num_decoder_layers else self.target_length
        return self.prompt_length + self.input_length + target


@dataclass(frozen=True)
class Cluster:
    """How many devices there are, and on how many machines."""

    gpus_per_node: int = 1
    nodes: int = 1
    on_cpu: bool = False
    """Whether CPUs compute. gloo then receives a block in memory of its own and copies it, and
    dropout keeps more."""

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.gpus_per_node * self.nodes

    def num_shards(self, cell: Cell) -> int:
        """Parts a sharded weight is cut into; 1 for a replicated one."""
        if cell.sharding == "replicated":
            return 1
        return self.gpus_per_node if cell.shard_group == "node" else self.num_gpus
