"""Weights into a skeleton: each rank reads the rows it will hold, and no other.

Axes: R rows, C columns, N bytes of a row, V vocabulary, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softprompt_dist.backbone.arrival import slot_sums
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.causal import CausalBackbone
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.embedding import FrozenEmbedding
from softprompt_dist.backbone.engine import BlockSizes, engine_config
from softprompt_dist.backbone.fingerprint import fingerprint
from softprompt_dist.backbone.flat_weights import FrozenBlock, row_ranges
from softprompt_dist.backbone.formats import Int8Rows, PlainRows, RowFormat
from softprompt_dist.backbone.inventory import Inventory
from softprompt_dist.backbone.layers import FrozenLinear
from softprompt_dist.backbone.replacements import replace_gated_feed_forwards, replace_norms
from softprompt_dist.backbone.seq2seq import Seq2SeqBackbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.identity import Identity, config_that_counts
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import Phase, counted, phase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BITSANDBYTES = ("llm_int8", "nf4")


def fill(
    inventory: Inventory,
    config: BackboneConfig,
    ds_config: dict[str, Any] | None,
    group: dist.ProcessGroup | None,
) -> Backbone:
    """The backbone of an inventory, in the cell that the config names; no collective inside.

    Raises:
        BackboneError: a file is damaged.
    """
    skeleton = inventory.skeleton
    _fill_buffers(inventory, DTYPES[config.dtype])
    quantizable = skeleton.quantizable(config.quantized_layers)
    for name in counted(skeleton.blocks, "laying out the layers", "layers"):
        _lay_out(inventory, name, config, quantizable)
        replace_gated_feed_forwards(skeleton.blocks[name].computation)
    shape = Seq2SeqBackbone if inventory.config.is_encoder_decoder else CausalBackbone
    embedding, identity = embedding_of(inventory, config), identity_of(inventory, config)
    backbone = shape(skeleton.model, embedding, inventory.config, identity)
    if config.sharding == "zero3":
        _fill_parts(backbone, inventory, config, ds_config, group)
    else:
        num_bytes = sum(block.num_bytes for block in skeleton.blocks.values())
        with phase("loading weights", num_bytes, "B") as told:
            for block in skeleton.blocks.values():
                run = torch.empty(block.num_bytes, dtype=torch.uint8, device=ranks.device())
                _copy_range(run, 0, block, inventory, told)
                block.hold(nn.Parameter(run, requires_grad=False))
    _choose_checkpointed(skeleton.blocks, config.activation_checkpointing)
    return backbone


def embedding_of(inventory: Inventory, config: BackboneConfig) -> FrozenEmbedding:
    """The table: on the device if the backbone is replicated, else in the mapped file.

    Raises:
        BackboneError: the file is damaged, or the table holds NaN.
    """
    dtype = DTYPES[config.dtype]
    name = inventory.stored[inventory.skeleton.embedding]
    table_VD = inventory.reader.mapped_table(name)
    if config.sharding == "replicated":
        table_VD = table_VD.to(ranks.device(), dtype, copy=True)
    else:  # nobody reads it whole: each rank looks through its share
        first, last = (len(table_VD) * (ranks.rank() + i) // ranks.world_size() for i in (0, 1))
        for rows in row_ranges(first, last, table_VD.shape[1] * table_VD.itemsize):
            inventory.reader.rows(name, rows.start, rows.stop)
    scale = inventory.skeleton.embedding_scale
    return FrozenEmbedding(table_VD, ranks.device(), dtype, scale)


def identity_of(inventory: Inventory, config: BackboneConfig) -> Identity:
    """What the backbone is, without its tokenizer, and how it is held."""
    return Identity(
        path=config.path,
        weights=fingerprint(inventory.reader, inventory.stored),
        config=config_that_counts(inventory.config),
        dtype=config.dtype,
        quantization=config.quantization,
    )


def encoded_rows(
    reader: CheckpointReader, stored: str, row_format: RowFormat, rows: range
) -> Tensor:
    """bytes_RN of some rows of a stored tensor."""
    if isinstance(row_format, Int8Rows):
        return reader.encoded_int8(stored, rows.start, rows.stop)
    return row_format.encode(reader.rows(stored, rows.start, rows.stop))


def _fill_parts(
    backbone: Backbone,
    inventory: Inventory,
    config: BackboneConfig,
    ds_config: dict[str, Any] | None,
    group: dist.ProcessGroup | None,
) -> None:
    from softprompt_dist.backbone.sharding import BlockSharder, run_bytes

    blocks = inventory.skeleton.blocks
    world_size = dist.get_world_size(group)
    all_bytes = [run_bytes(block.num_bytes, world_size) for block in blocks.values()]
    *repeated, head = all_bytes
    sizes = BlockSizes(max(repeated), head, world_size)
    backbone.engine_config = engine_config(config, ds_config, sizes)
    sharder = BlockSharder(backbone.engine_config, backbone.traffic, group)
    with phase("loading weights", sum(all_bytes) // world_size, "B") as told:
        for block in blocks.values():

            def fill_part(into: Tensor, first_byte: int, block: FrozenBlock = block) -> None:
                _copy_range(into, first_byte, block, inventory, told)

            block.hold(sharder.shard(block.num_bytes, fill_part))


def _copy_range(
    into: Tensor, first_byte: int, block: FrozenBlock, inventory: Inventory, told: Phase
) -> None:
    """Fill `into` with the block's bytes from `first_byte` on, and note their sums."""
    last_byte = min(first_byte + len(into), block.num_bytes)
    for slot in block.slots:
        stored, num_copied = inventory.stored[slot.name], 0
        for rows in slot.pieces(first_byte, last_byte):
            start, end = slot.place(rows, first_byte, last_byte)
            encoded = encoded_rows(inventory.reader, stored, slot.format, rows).view(-1)
            skipped = start - slot.start - rows.start * slot.row_bytes
            into[start - first_byte : end - first_byte] = encoded[skipped : skipped + end - start]
            num_copied += end - start
            told.advance(end - start)
        _, total = slot_sums(slot, into, first_byte)
        # Counted here, not there: a row that was left out would leave its mark on no sum.
        inventory.sums[slot.name] = (num_copied, total)


def _lay_out(
    inventory: Inventory, block_name: str, config: BackboneConfig, quantizable: set[str]
) -> None:
    skeleton = inventory.skeleton
    block, linears = skeleton.blocks[block_name], skeleton.linears[block_name]
    plain = PlainRows(DTYPES[config.dtype])
    for holder, attribute, linear in linears:
        keep = linear.name not in quantizable
        if config.quantization in _BITSANDBYTES and not keep:
            setattr(holder, attribute, _bitsandbytes_layer(inventory, linear, config))
            continue
        row_format = Int8Rows() if config.quantization == "int8" and not keep else plain
        linear.slot = block.add_slot(
            linear.name, row_format, linear.out_features, linear.in_features
        )


def _bitsandbytes_layer(
    inventory: Inventory, linear: FrozenLinear, config: BackboneConfig
) -> nn.Module:
    from softprompt_dist.backbone.bitsandbytes_linear import LLMInt8Linear, Nf4Linear

    dtype = DTYPES[config.dtype]
    weight_RC = inventory.reader.tensor(inventory.stored[linear.name])
    weight_RC = weight_RC.to(ranks.device(), dtype)
    if config.quantization == "nf4":
        return Nf4Linear(weight_RC, linear.bias, dtype=dtype)
    threshold = config.outlier_threshold
    return LLMInt8Linear(weight_RC, linear.bias, dtype=dtype, outlier_threshold=threshold)


def _fill_buffers(inventory: Inventory, dtype: torch.dtype) -> None:
    device = ranks.device()
    for name, module, attribute in inventory.buffers:
        # A copy: a view would keep the file mapped.
        value = inventory.reader.tensor(inventory.stored[name]).to(device, dtype, copy=True)
        module._parameters.pop(attribute, None)  # noqa: SLF001 - from a parameter to a buffer
        module.register_buffer(attribute, value)
    for part in (inventory.skeleton.model, *inventory.skeleton.blocks.values()):
        root = part.computation if isinstance(part, FrozenBlock) else part
        replace_norms(root)
        root.to(device)  # what the model computed for itself, such as rotary frequencies


def _choose_checkpointed(blocks: dict[str, FrozenBlock], choice: str) -> None:
    every = {"none": 0, "full": 1}.get(choice) if not choice.startswith("every_") else None
    every = int(choice.removeprefix("every_")) if every is None else every
    *repeated, _head = blocks.values()
    for index, block in enumerate(repeated):
        block.checkpoint_activations = every > 0 and index % every == 0
