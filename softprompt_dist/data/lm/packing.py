"""Which examples share a row, from their lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softprompt_dist.data.lm.token_source import IdArray


@dataclass(frozen=True)
class Layout:
    """Where E examples lie in rows; int64 [E] each. Lengths count end-of-sequence."""

    rows: IdArray
    segments: IdArray
    """k for the k-th example of its row."""
    input_starts: IdArray
    input_lengths: IdArray
    target_starts: IdArray
    target_lengths: IdArray

    @property
    def num_real_tokens(self) -> int:
        """Positions of both sides that are not padding."""
        return int(self.input_lengths.sum() + self.target_lengths.sum())


def one_per_row(input_lengths: IdArray, target_lengths: IdArray) -> Layout:
    """Every example alone."""
    zeros = np.zeros_like(input_lengths)
    rows = np.arange(len(input_lengths))
    return Layout(rows, zeros + 1, zeros, input_lengths, zeros, target_lengths)


def complementary_pairs(prefix_lengths: IdArray, piece_length: int) -> Layout:
    """Two pieces a row: the first's prefix and the second's fill up the encoder, the rest the
    decoder (architecture-objective's `pack_prefix_lm_encoder_decoder`).

    Args:
        prefix_lengths: of the first piece of each of B rows, in [1, piece_length); the second's
            is what is left to `piece_length`.
        piece_length: of every piece, and of both sides of a row.
    """  # noqa: D205
    rows = np.arange(len(prefix_lengths))
    zeros = np.zeros_like(prefix_lengths)
    rest = piece_length - prefix_lengths

    def alternating(first: IdArray, second: IdArray) -> IdArray:
        return np.stack([first, second], axis=1).reshape(-1)

    return Layout(
        rows=alternating(rows, rows),
        segments=alternating(zeros + 1, zeros + 2),
        input_starts=alternating(zeros, prefix_lengths),
        input_lengths=alternating(prefix_lengths, rest),
        target_starts=alternating(zeros, rest),
        target_lengths=alternating(rest, prefix_lengths),
    )


class FirstFit:
    """Puts every example into the first row where both of its sides fit."""

    def __init__(self, num_rows: int, inputs_length: int, targets_length: int) -> None:
        """Start with empty rows."""
        self._lengths = (inputs_length, targets_length)
        self._input_room = np.full(num_rows, inputs_length, dtype=np.int32)
        self._target_room = np.full(num_rows, targets_length, dtype=np.int32)
        self._num_in_row = [0] * num_rows
        self._placed: list[tuple[int, int, int, int, int, int]] = []

    def add(self, input_lengths: IdArray, target_lengths: IdArray) -> int:
        """Add examples in order until one fits nowhere; how many fitted."""
        input_room, target_room = self._input_room, self._target_room
        fits, fits_too = np.empty((2, len(input_room)), dtype=np.bool_)
        pairs = zip(input_lengths.tolist(), target_lengths.tolist(), strict=True)
        for number, (num_inputs, num_targets) in enumerate(pairs):
            np.greater_equal(input_room, num_inputs, out=fits)
            np.greater_equal(target_room, num_targets, out=fits_too)
            np.logical_and(fits, fits_too, out=fits)
            row = int(fits.argmax())
            if not fits[row]:
                return number
            self._place(row, num_inputs, num_targets)
        return len(input_lengths)

    @property
    def layout(self) -> Layout:
        """Of all examples added, in their order."""
        columns = np.array(self._placed, dtype=np.int64).reshape(-1, 6).T
        return Layout(*columns)

    def _place(self, row: int, num_inputs: int, num_targets: int) -> None:
        input_room, target_room = int(self._input_room[row]), int(self._target_room[row])
        input_start, target_start = self._lengths[0] - input_room, self._lengths[1] - target_room
        self._num_in_row[row] += 1
        segment = self._num_in_row[row]
        self._placed.append((row, segment, input_start, num_inputs, target_start, num_targets))
        self._input_room[row] = input_room - num_inputs
        self._target_room[row] = target_room - num_targets
