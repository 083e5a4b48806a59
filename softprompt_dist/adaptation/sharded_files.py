"""Sharded tensors to safetensors files and back, no tensor ever whole in a rank's memory.

To the disk: every rank puts what it holds of a chunk into zeros, the sum of all is the chunk, and
rank 0 writes it. From the disk: each rank reads only its own elements. So the files know nothing of
how the tensors were spread, and may be read on any number of ranks.  Axes: N elements, R rows, C
columns (all but the first axis, flattened).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.safetensors_file import (
    Entry,
    SafetensorsStream,
    in_shards,
    index_of_shards,
)
from softprompt_dist.durable import FileDigest, digest_of, free_bytes, write_file
from softprompt_dist.errors import BackboneError, MachineError, SoftpromptError
from softprompt_dist.parallel import ranks

CHUNK_BYTES = 64 * 2**20
"""Of fp32 numbers; this much of a tensor is gathered, written or read at a time."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFormat:
    """How tensors lie in files."""

    dtype: torch.dtype = torch.float32
    """float32 (every bit as it is) or bfloat16 (rounded to the nearest)."""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    """Of each file's header; transformers asks for the format."""
    max_shard_bytes: int | None = None
    """Of a file; None: one file, whatever its size."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Name -> what its numbers are multiplied by on the way."""


def num_bytes_of(tensors: Mapping[str, ShardedTensor], dtype: torch.dtype = torch.float32) -> int:
    """What `write_tensors` takes on the disk, but for headers of some kilobytes."""
    return sum(tensor.numel for tensor in tensors.values()) * dtype.itemsize


def write_tensors(
    folder: Path,
    tensors: Mapping[str, ShardedTensor],
    weight_format: WeightFormat | None = None,
    *,
    error: Callable[[OSError], SoftpromptError] | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, FileDigest]:
    """All ranks: write model.safetensors, or shards with an index, into rank 0's `folder`.

    Every rank names the same tensors. Files are flushed to the disk; their digests come back by
    name, on every rank. `between` is called on all ranks before each chunk; what it raises, on all
    of them, cuts the writing short and leaves files that are not whole.

    Raises:
        MachineError: on all ranks, when they cannot be written: none of them is left. `error` may
            make another of the reason.
    """
    chosen = weight_format or WeightFormat()
    _check_whole(tensors)
    entries = [Entry(name, chosen.dtype, tensors[name].shape) for name in sorted(tensors)]
    files = in_shards(entries, chosen.max_shard_bytes)
    chunks = _gathered_chunks(tensors, between)
    digests: dict[str, FileDigest] = {}
    failure: OSError | None = None
    if ranks.is_main():
        try:
            digests = _write_files(folder, files, chunks, chosen)
        except OSError as reason:
            failure = reason
    for _ in chunks:  # the part of the other ranks; and of rank 0, should it be unable to write
        pass

    def outcome() -> dict[str, FileDigest]:
        if failure is not None:
            for name in (*files, INDEX):
                with suppress(OSError):
                    (folder / name).unlink()
            needed = num_bytes_of(tensors, chosen.dtype)
            raise error(failure) if error else _not_written(folder, failure, needed)
        return digests

    return ranks.on_main(outcome)


def read_into(
    folder: Path,
    tensors: Mapping[str, ShardedTensor],
    stored_names: Mapping[str, str] | None = None,
    *,
    error: type[SoftpromptError] = BackboneError,
) -> None:
    """All ranks: fill the pieces from the weight files of `folder`, each rank only its own.

    Files are safetensors (one or shards) or `.bin`, in any floating-point type. `stored_names`
    gives the names in the files, where they are not those of `tensors`.

    Raises:
        BackboneError: on all ranks; a file is damaged. Or `error`: a tensor is missing or has
            another shape.
    """
    ranks.together(lambda: _read_into(folder, tensors, stored_names or {}, error))


def _check_whole(tensors: Mapping[str, ShardedTensor]) -> None:
    """All ranks. What no rank holds would be written as zeros."""
    names = sorted(name for name in tensors if not tensors[name].is_replicated)
    held = [sum(len(piece.values) for piece in tensors[name].pieces) for name in names]
    counts = torch.tensor(held, dtype=torch.int64, device=ranks.device())
    for name, count in zip(names, ranks.all_reduce_sum(counts).tolist(), strict=True):
        assert count == tensors[name].numel, (
            f"the ranks hold {count} elements of {name}, which has {tensors[name].numel}"
        )


def _gathered_chunks(
    tensors: Mapping[str, ShardedTensor], between: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    """All ranks, each to the end: (name, values_N fp32 on the CPU), whole on rank 0 alone."""
    for name in sorted(tensors):
        tensor = tensors[name]
        for stretch in _stretches(0, tensor.numel, CHUNK_BYTES // 4):
            between()
            if not tensor.is_replicated or ranks.is_main():
                yield name, _gathered(tensor, stretch)


def _gathered(tensor: ShardedTensor, stretch: range) -> Tensor:
    # As integers: adding zeros to them changes no bit, neither of -0.0 nor of a NaN.
    is_shared = not tensor.is_replicated and ranks.world_size() > 1
    device = ranks.device() if is_shared else torch.device("cpu")
    chunk_N = torch.zeros(len(stretch), dtype=torch.int32, device=device)
    for piece, elements in _overlaps(tensor.pieces, stretch):
        assert piece.values.dtype == torch.float32
        held_N = piece.values.detach()[elements.start - piece.first : elements.stop - piece.first]
        first = elements.start - stretch.start
        chunk_N[first : first + len(elements)] = held_N.view(torch.int32)
    if is_shared:
        ranks.reduce_sum_to_main(chunk_N)
    values_N = chunk_N.cpu() if ranks.is_main() else chunk_N[:0].cpu()
    return values_N.view(torch.float32)


def _overlaps(pieces: Iterable[Piece], stretch: range) -> Iterator[tuple[Piece, range]]:
    """Pieces that reach into a stretch of the flattened tensor, and where they do."""
    for piece in pieces:
        first = max(piece.first, stretch.start)
        last = min(piece.first + len(piece.values), stretch.stop)
        if first < last:
            yield piece, range(first, last)


def _stretches(first: int, last: int, size: int) -> Iterator[range]:
    for start in range(first, last, size):
        yield range(start, min(start + size, last))


def _write_files(
    folder: Path,
    files: Mapping[str, list[Entry]],
    chunks: Iterator[tuple[str, Tensor]],
    chosen: WeightFormat,
) -> dict[str, FileDigest]:
    digests = {}
    for file_name, entries in files.items():
        with SafetensorsStream(folder / file_name, entries, chosen.metadata) as stream:
            while stream.bytes_missing:
                name, values_N = next(chunks)
                if name in chosen.factors:
                    values_N = values_N * chosen.factors[name]
                stream.write(values_N.to(chosen.dtype))
            digests[file_name] = stream.digest
    if len(files) > 1:
        index = index_of_shards(files)
        write_file(folder / INDEX, index)
        digests[INDEX] = digest_of(index)
    return digests


def _not_written(folder: Path, reason: OSError, needed: int) -> MachineError:
    return MachineError(
        f"{folder} could not be written: {reason.strerror or reason}. The weights take "
        f"{needed:,} bytes, {free_bytes(folder)} are free there. Free some space or permit it."
    )


def _read_into(
    folder: Path,
    tensors: Mapping[str, ShardedTensor],
    stored_names: Mapping[str, str],
    error: type[SoftpromptError],
) -> None:
    reader = CheckpointReader(folder)
    try:
        wanted = {name: stored_names.get(name, name) for name in tensors}
        _check_stored(reader, tensors, wanted, error)
        # In the order of the files' tensors: pages are read ahead.
        for name in sorted(tensors):
            for piece in tensors[name].pieces:
                _fill(piece, reader, wanted[name])
    finally:
        reader.close()


def _check_stored(
    reader: CheckpointReader,
    tensors: Mapping[str, ShardedTensor],
    wanted: Mapping[str, str],
    error: type[SoftpromptError],
) -> None:
    shapes = reader.shapes
    missing = sorted(stored for stored in wanted.values() if stored not in shapes)
    wrong = [
        f"{stored} is {shapes[stored]}, not {tensors[name].shape}"
        for name, stored in sorted(wanted.items())
        if stored in shapes and shapes[stored] != tensors[name].shape
    ]
    codes = sorted(s for s in wanted.values() if s in shapes and not _is_exact(reader, s))
    if missing:
        raise error(
            f"{reader.folder} lacks {len(missing)} tensors of the model: {missing[:5]}. Use the "
            "weights and the configuration that belong together."
        )
    if wrong:
        raise error(
            f"{reader.folder} holds {len(wrong)} tensors of another shape: {'; '.join(wrong[:5])}. "
            "Use the weights and the configuration that belong together."
        )
    if codes:
        raise error(
            f"{reader.folder} holds {len(codes)} tensors that are quantized, and what that has "
            f"rounded away cannot be trained: {codes[:5]}. Use the original checkpoint."
        )


def _is_exact(reader: CheckpointReader, name: str) -> bool:
    return reader.holds_numbers(name) and not reader.is_quantized(name)


@torch.no_grad()
def _fill(piece: Piece, reader: CheckpointReader, name: str) -> None:
    """Read the rows that cover a piece, some at a time, and keep what is its."""
    shape = reader.shapes[name]
    num_columns = torch.Size(shape[1:]).numel()
    end = piece.first + len(piece.values)
    if piece.first == end:
        return
    rows = range(piece.first // num_columns, -(-end // num_columns))
    for some in _stretches(rows.start, rows.stop, max(1, CHUNK_BYTES // 4 // num_columns)):
        read_N = reader.rows(name, some.start, some.stop).reshape(-1)
        offset = some.start * num_columns
        for _, own in _overlaps([piece], range(offset, offset + len(read_N))):
            target_N = piece.values[own.start - piece.first : own.stop - piece.first]
            target_N.copy_(read_N[own.start - offset : own.stop - offset])
