"""Sharded tensors to safetensors files and back, no tensor ever whole in a rank's memory.

To the disk: every rank sends what it holds of a chunk to rank 0, which puts it together and writes
it. From the disk: each rank reads only its own elements. So no rank moves more than its share, and
the files know nothing of how the tensors were spread: they may be read on any number of ranks.
Axes: N elements, R rows, C columns (all but the first axis, flattened).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from softprompt_dist.progress import Phase, phase

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
    extents = _extents(tensors)
    entries = [Entry(name, chosen.dtype, tensors[name].shape) for name in sorted(tensors)]
    files = in_shards(entries, chosen.max_shard_bytes)
    chunks = _gathered_chunks(tensors, extents, between)
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


def _extents(tensors: Mapping[str, ShardedTensor]) -> dict[str, list[list[range]]]:
    """All ranks: name -> the elements that each rank has to give, which are all there are."""
    own = {
        name: [piece.elements for piece in tensor.pieces]
        for name, tensor in tensors.items()
        if ranks.is_main() or not tensor.is_replicated
    }
    of_ranks = ranks.gather_objects(own)
    extents = {name: [given.get(name, []) for given in of_ranks] for name in tensors}
    for name, given in extents.items():
        count = sum(len(elements) for of_rank in given for elements in of_rank)
        assert count == tensors[name].numel, (
            f"the ranks hold {count} elements of {name}, which has {tensors[name].numel}"
        )
    return extents


def _gathered_chunks(
    tensors: Mapping[str, ShardedTensor],
    extents: Mapping[str, Sequence[Sequence[range]]],
    between: Callable[[], None],
) -> Iterator[tuple[str, Tensor]]:
    """All ranks, each to the end: (name, values_N fp32 on the CPU), whole on rank 0 alone."""
    for name in sorted(tensors):
        for stretch in _stretches(0, tensors[name].numel, CHUNK_BYTES // 4):
            between()
            yield name, _gathered(tensors[name], extents[name], stretch)


def _gathered(tensor: ShardedTensor, extents: Sequence[Sequence[range]], stretch: range) -> Tensor:
    given = [[found for held in one if (found := _common(held, stretch))] for one in extents]
    own_N = torch.empty(0, device=ranks.device())
    if given[ranks.rank()]:
        own = [p.values.detach()[_slice(e, p.first)] for p, e in _overlaps(tensor.pieces, stretch)]
        assert all(values_N.dtype == torch.float32 for values_N in own)
        own_N = torch.cat([values_N.to(ranks.device()) for values_N in own])
    parts = ranks.gather_to_main(own_N, [sum(map(len, one)) for one in given])
    chunk_N = torch.empty(len(stretch) if ranks.is_main() else 0)
    for one, part_N in zip(given, parts, strict=False):  # elsewhere there are no parts
        for elements, values_N in zip(one, part_N.split([len(e) for e in one]), strict=True):
            chunk_N[_slice(elements, stretch.start)] = values_N
    return chunk_N


def _overlaps(pieces: Iterable[Piece], stretch: range) -> Iterator[tuple[Piece, range]]:
    """Pieces that reach into a stretch of the flattened tensor, and where they do."""
    for piece in pieces:
        if found := _common(piece.elements, stretch):
            yield piece, found


def _common(elements: range, others: range) -> range:
    return range(max(elements.start, others.start), min(elements.stop, others.stop))


def _slice(elements: range, first: int) -> slice:
    """Where they are in a tensor that begins with the element `first`."""
    return slice(elements.start - first, elements.stop - first)


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
    num_bytes = sum(entry.num_bytes for entries in files.values() for entry in entries)
    with phase("writing weights", num_bytes, "B") as told:
        for file_name, entries in files.items():
            with SafetensorsStream(folder / file_name, entries, chosen.metadata) as stream:
                while stream.bytes_missing:
                    name, values_N = next(chunks)
                    if name in chosen.factors:
                        values_N = values_N * chosen.factors[name]
                    stream.write(values_N.to(chosen.dtype))
                    told.advance(values_N.numel() * chosen.dtype.itemsize)
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
        with phase("reading weights", _held_bytes(tensors), "B") as told:
            for name in sorted(tensors):
                for piece in tensors[name].pieces:
                    _fill(piece, reader, wanted[name], told)
    finally:
        reader.close()


def _held_bytes(tensors: Mapping[str, ShardedTensor]) -> int:
    return sum(4 * len(piece.values) for tensor in tensors.values() for piece in tensor.pieces)


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
def _fill(piece: Piece, reader: CheckpointReader, name: str, told: Phase) -> None:
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
            piece.values[_slice(own, piece.first)].copy_(read_N[_slice(own, offset)])
            told.advance(4 * len(own))
