"""A checkpoint written once more, in the precision in which it will be held.

A copy is read back and compared before it gets its name, and it carries the identity of its source:
prompts move freely between the two.  Axes: R rows, C columns, N bytes of a row.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt_dist.backbone.checkpoint_reader import SCALE_SUFFIX, CheckpointReader
from softprompt_dist.backbone.filling import DTYPES, encoded_rows
from softprompt_dist.backbone.fingerprint import IDENTITY_KEY, fingerprint
from softprompt_dist.backbone.flat_weights import row_ranges
from softprompt_dist.backbone.formats import Int8Rows, PlainRows
from softprompt_dist.backbone.inventory import Inventory, take_inventory
from softprompt_dist.backbone.safetensors_file import (
    Entry,
    SafetensorsWriter,
    in_shards,
    index_of_shards,
)
from softprompt_dist.durable import new_folder, write_file
from softprompt_dist.errors import BackboneError, ConfigError, MachineError
from softprompt_dist.progress import phase

_CONFIG = "config.json"
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "vocab.*", "LICENSE*", "NOTICE*")
_INDEX_SUFFIX = ".index.json"
_ROOM_TO_SPARE = 16 * 2**20
"""Headers, folders, file system."""


@dataclass(frozen=True)
class CopyFormat:
    """How a copy stores its tensors."""

    quantized_layers: str | None
    """Matrices that are stored as int8, as in `backbone.quantized_layers`; None: no matrix."""
    dtype: str
    """fp32 or bf16, for all else."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a copy, and what it is made from."""

    source: str
    """Its name in the source checkpoint."""
    format: Int8Rows | PlainRows
    entries: tuple[Entry, ...]
    """What the copy stores for it: the weight, and behind an int8 one its rows' scales."""

    @property
    def name(self) -> str:
        """In the model and in the copy."""
        return self.entries[0].name

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        return sum(entry.num_bytes for entry in self.entries)

    def row_ranges(self) -> Iterator[range]:
        """Its rows, some at a time."""
        num_rows, *rest = self.entries[0].shape or (1,)
        num_columns = torch.Size(rest).numel()
        return row_ranges(0, num_rows, self.format.row_bytes(num_columns))

    def write_rows(self, file: SafetensorsWriter, first: int, bytes_RN: Tensor) -> None:
        """Put rows of it, in its format, where `file` has their place."""
        if isinstance(self.format, Int8Rows):
            quantized_RC, scale_R = self.format.split(bytes_RN)
            file.write_rows(self.name, first, quantized_RC.view(torch.uint8))
            scale_bytes = scale_R.contiguous()[:, None].view(torch.uint8)
            file.write_rows(self.name + SCALE_SUFFIX, first, scale_bytes)
        else:
            file.write_rows(self.name, first, bytes_RN)


def check_output(output: Path) -> None:
    """That there is nothing where the copy will be; an empty folder may be.

    Raises:
        ConfigError: something is there.
    """
    is_empty_folder = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if os.path.lexists(output) and not is_empty_folder:
        raise ConfigError(
            f"--output {output} is there already, and nothing is ever overwritten. Name a new "
            "folder, or remove that one."
        )


def weights_of_copy(inventory: Inventory, copy_format: CopyFormat) -> list[StoredWeight]:
    """What the copy of a checkpoint stores; a head that is the embedding table only once.

    Raises:
        BackboneError: the source holds int8 where the copy would not.
    """
    skeleton, reader = inventory.skeleton, inventory.reader
    quantized: set[str] = set()
    if copy_format.quantized_layers is not None:
        quantized = skeleton.quantizable(copy_format.quantized_layers)
    weights = []
    for name, source in inventory.stored.items():
        if reader.is_quantized(source) and name not in quantized:
            raise BackboneError(
                f"{reader.folder} stores {source} as int8, and what int8 has rounded away cannot "
                f"be brought back in {copy_format.dtype}. Convert from the original checkpoint."
            )
        if name != skeleton.embedding and _is_the_embedding(inventory, name):
            continue
        shape = reader.shapes[source]
        if name in quantized:
            scales = Entry(name + SCALE_SUFFIX, torch.float32, (shape[0], 1))
            entries = (Entry(name, torch.int8, shape), scales)
            weights.append(StoredWeight(source, Int8Rows(), entries))
        else:
            dtype = DTYPES[copy_format.dtype]
            weights.append(StoredWeight(source, PlainRows(dtype), (Entry(name, dtype, shape),)))
    return weights


def write_copy(
    inventory: Inventory,
    weights: list[StoredWeight],
    output: Path,
    *,
    max_shard_bytes: int,
) -> None:
    """Write the folder `output`: whole, flushed to the disk and compared with its source, or not.

    Raises:
        BackboneError: a source file is damaged, or the copy is not what it should be.
        MachineError: it cannot be written there.
    """
    try:
        _check_room(inventory.reader.folder, weights, output)
        with new_folder(output) as folder:
            _write_weights(inventory, weights, folder, max_shard_bytes)
            _compare(inventory, weights, folder)
            _copy_the_rest(inventory.reader.folder, weights, folder)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise MachineError(
            f"Cannot write {output}: {error.strerror or error}{place}. Nothing is left there. "
            "Choose a folder that this user may write to, on a disk with room (--output)."
        ) from error


def _is_the_embedding(inventory: Inventory, name: str) -> bool:
    """Whether a tensor is the head of a tied model; some checkpoints store the table twice."""
    source, table = inventory.stored[name], inventory.stored[inventory.skeleton.embedding]
    if source == table:
        return True
    if name != inventory.skeleton.head or inventory.skeleton.has_own_head:
        return False
    return inventory.reader.are_equal(source, table)


def _num_bytes(weights: list[StoredWeight]) -> int:
    return sum(weight.num_bytes for weight in weights)


def _check_room(source: Path, weights: list[StoredWeight], output: Path) -> None:
    needed = _num_bytes(weights) + _ROOM_TO_SPARE
    needed += sum(file.stat().st_size for file in _files_beside_weights(source))
    disk = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise MachineError(
            f"The copy takes {needed / 1e9:.2f} GB, and {disk} has {free / 1e9:.2f} GB free. Free "
            "some space, or choose another --output."
        )


def _write_weights(
    inventory: Inventory,
    weights: list[StoredWeight],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    reader = inventory.reader
    metadata = {"format": "pt", IDENTITY_KEY: fingerprint(reader, inventory.stored)}
    shards = in_shards(weights, max_shard_bytes)
    entries = {name: [e for w in shard for e in w.entries] for name, shard in shards.items()}
    with phase("writing", _num_bytes(weights), "B") as told:
        for name, shard in shards.items():
            with SafetensorsWriter(folder / name, entries[name], metadata) as file:
                for weight in shard:
                    for rows in weight.row_ranges():
                        encoded = encoded_rows(reader, weight.source, weight.format, rows)
                        weight.write_rows(file, rows.start, encoded)
                        told.advance(encoded.numel())
    if len(shards) > 1:
        write_file(folder / f"model.safetensors{_INDEX_SUFFIX}", index_of_shards(entries))


def _compare(inventory: Inventory, weights: list[StoredWeight], folder: Path) -> None:
    copy = take_inventory(inventory.skeleton, CheckpointReader(folder), inventory.config)
    differing = []
    with phase("checking", _num_bytes(weights), "B") as told:
        for weight in weights:
            for rows in weight.row_ranges():
                expected = encoded_rows(inventory.reader, weight.source, weight.format, rows)
                found = encoded_rows(copy.reader, copy.stored[weight.name], weight.format, rows)
                told.advance(expected.numel())
                if not torch.equal(expected, found):
                    differing.append(weight.name)
                    break
    copy.reader.close()
    if differing:
        raise BackboneError(
            f"{len(differing)} tensors were read back otherwise than {inventory.reader.folder} "
            f"has them: {differing[:5]}. The copy is deleted. Is the source still being written? "
            "If not, the disk is failing: choose another --output."
        )


def _copy_the_rest(source: Path, weights: list[StoredWeight], folder: Path) -> None:
    for file in _files_beside_weights(source):
        if file.name != _CONFIG:
            write_file(folder / file.name, file.read_bytes())
    # Last: a folder without it is no checkpoint, should this process end here.
    config = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    write_file(folder / _CONFIG, _json(_config_of_copy(config, weights)))


def _config_of_copy(config: dict[str, Any], weights: list[StoredWeight]) -> dict[str, Any]:
    plain = next(w.format.dtype for w in weights if isinstance(w.format, PlainRows))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config = config | {key: str(plain).removeprefix("torch.")}
    if any(isinstance(weight.format, Int8Rows) for weight in weights):
        # transformers refuses a method that is not named; of an unknown one it would take the
        # integers for weights.
        note = f"int8 rows, times the fp32 scales in NAME{SCALE_SUFFIX}; see softprompt convert"
        config["quantization_config"] = {"softprompt": note}
    return config


def _files_beside_weights(source: Path) -> list[Path]:
    found = {path for pattern in _BESIDE_WEIGHTS for path in source.glob(pattern)}
    return sorted(p for p in found if p.is_file() and not p.name.endswith(_INDEX_SUFFIX))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
