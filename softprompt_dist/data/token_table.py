"""Token ids of many examples in four flat arrays, which may lie in a mapped file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

import numpy as np
import numpy.typing as npt

from softprompt_dist.data.batching import TokenExample


@dataclass(frozen=True)
class IdRows:
    """Rows of token ids, end to end."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    """Row i is `ids[offsets[i] : offsets[i + 1]]`."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> IdRows:
        """The same rows, end to end."""
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        ids = np.concatenate([np.empty(0, dtype=np.int32), *parts])
        return cls(ids, np.concatenate([np.zeros(1, dtype=np.int64), ends]))

    @classmethod
    def joined(cls, parts: Sequence[IdRows]) -> IdRows:
        """The rows of all parts, one part after another."""
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return cls(np.concatenate([part.ids for part in parts]), offsets)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of ids in each row, [N]."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[int, ...]:
        """Ids of row `index`, which is not negative."""
        return tuple(self.ids[self.offsets[index] : self.offsets[index + 1]].tolist())


@dataclass(frozen=True, eq=False)
class TokenTable(Sequence[TokenExample]):
    """The token ids of examples; an example is made when it is asked for."""

    inputs: IdRows
    targets: IdRows
    num_truncated: int
    """How many inputs were longer than the limit and cut."""
    left_out: tuple[int, ...] = ()
    """Positions of examples without a token, which are not among the rows."""

    @classmethod
    def of(cls, examples: Sequence[TokenExample], num_truncated: int = 0) -> TokenTable:
        """The same examples as a table."""
        inputs = IdRows.of(example.input_ids for example in examples)
        targets = IdRows.of(example.target_ids for example in examples)
        return cls(inputs, targets, num_truncated)

    @classmethod
    def joined(cls, parts: Sequence[TokenTable]) -> TokenTable:
        """The examples of all parts, one part after another."""
        sizes = [len(part) + len(part.left_out) for part in parts]
        starts = list(accumulate(sizes, initial=0))[:-1]
        return cls(
            IdRows.joined([part.inputs for part in parts]),
            IdRows.joined([part.targets for part in parts]),
            sum(part.num_truncated for part in parts),
            tuple(
                start + i for start, part in zip(starts, parts, strict=False) for i in part.left_out
            ),
        )

    @property
    def input_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each input, [N]."""
        return self.inputs.lengths

    @property
    def target_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each target, [N]."""
        return self.targets.lengths

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> TokenExample: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TokenExample, ...]: ...

    def __getitem__(self, index: int | slice) -> TokenExample | tuple[TokenExample, ...]:
        """One example, or those of a slice.

        Raises:
            IndexError: there is no such example.
        """
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        place = range(len(self))[index]
        return TokenExample(self.inputs.row(place), self.targets.row(place))
