"""Examples of prefix LM at their places in rows of ids, labels and segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from softprompt_dist.data.batching import IGNORED_LABEL
from softprompt_dist.data.lm.packing import Layout
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.token_source import IdArray


class RowShape(NamedTuple):
    """Of a batch of encoder-decoder rows."""

    num_rows: int
    inputs_length: int
    targets_length: int


def fill_rows(
    pieces: Sequence[IdArray],
    layout: Layout,
    shape: RowShape,
    special: SpecialIds,
    *,
    append_eos: bool,
) -> RowBatch:
    """The first tokens of each piece as input, the following ones as target.

    Args:
        pieces: Tokens of each example of `layout`, without end-of-sequence.
        layout: Where they go; rows count from 0.
        shape: Of the batch.
        special: Ids of padding, end-of-sequence and the decoder's start.
        append_eos: Whether both sides of each example end in end-of-sequence, which the lengths
            of `layout` then include.
    """
    arrays = _filled(pieces, layout, shape, special, append_eos=append_eos)
    input_ids_BS, input_segments_BS, labels_BT, target_segments_BT = arrays
    decoder_input_ids_BT = shifted_right(labels_BT, target_segments_BT, special.start)
    num_real_tokens = layout.num_real_tokens
    return RowBatch(
        decoder_input_ids_BT=torch.from_numpy(decoder_input_ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        target_segments_BT=torch.from_numpy(target_segments_BT),
        is_packed=bool((layout.segments > 1).any()),
        has_padding=num_real_tokens < input_ids_BS.size + labels_BT.size,
        num_real_tokens=num_real_tokens,
        input_ids_BS=torch.from_numpy(input_ids_BS),
        input_segments_BS=torch.from_numpy(input_segments_BS),
    )


def shifted_right(labels_BT: IdArray, segments_BT: IdArray, start_id: int) -> IdArray:
    """What the decoder reads: each segment's labels one to the right, behind a start piece.

    Padding reads the start piece, too.
    """
    shifted_BT = np.full_like(labels_BT, start_id)
    goes_on_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
    shifted_BT[:, 1:][goes_on_BT] = labels_BT[:, :-1][goes_on_BT]
    return shifted_BT


def _filled(
    pieces: Sequence[IdArray],
    layout: Layout,
    shape: RowShape,
    special: SpecialIds,
    *,
    append_eos: bool,
) -> tuple[IdArray, IdArray, IdArray, IdArray]:
    """Ids and segments of the inputs, labels and segments of the targets."""
    num_rows, inputs_length, targets_length = shape
    input_ids_BS = np.full((num_rows, inputs_length), special.pad, dtype=np.int64)
    labels_BT = np.full((num_rows, targets_length), IGNORED_LABEL, dtype=np.int64)
    input_segments_BS = np.zeros_like(input_ids_BS)
    target_segments_BT = np.zeros_like(labels_BT)
    for piece, place in zip(pieces, _places(layout), strict=True):
        row, segment, input_start, num_inputs, target_start, num_targets = place
        inputs = slice(input_start, input_start + num_inputs)
        targets = slice(target_start, target_start + num_targets)
        num_prefix, num_rest = num_inputs - append_eos, num_targets - append_eos
        if append_eos:
            input_ids_BS[row, inputs.stop - 1] = special.eos
            labels_BT[row, targets.stop - 1] = special.eos
        input_ids_BS[row, input_start : input_start + num_prefix] = piece[:num_prefix]
        labels_BT[row, target_start : target_start + num_rest] = piece[
            num_prefix : num_prefix + num_rest
        ]
        input_segments_BS[row, inputs] = segment
        target_segments_BT[row, targets] = segment
    return input_ids_BS, input_segments_BS, labels_BT, target_segments_BT


def _places(layout: Layout) -> list[list[int]]:
    columns = (
        layout.rows,
        layout.segments,
        layout.input_starts,
        layout.input_lengths,
        layout.target_starts,
        layout.target_lengths,
    )
    places: list[list[int]] = np.stack(columns, axis=1).tolist()
    return places
