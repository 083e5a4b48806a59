"""T5's span corruption: full rows of running text with spans replaced by sentinels."""

from __future__ import annotations

import numpy as np
import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.data.lm.draws import SpanCounts, random_spans_masks
from softprompt_dist.data.lm.objectives import SpanLengths, corrupt_spans, random_spans_helper
from softprompt_dist.data.lm.order import Order
from softprompt_dist.data.lm.pieces import EqualPieces
from softprompt_dist.data.lm.plan import BatchPlan
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.token_source import IdArray, TokenSource
from softprompt_dist.errors import ConfigError, DataError

LONGEST_TO_PROPOSE = 1024


class SpanCorruption:
    """Rows of exactly as many positions as the corrupted text needs: no padding."""

    def __init__(self, corpus: TokenSource, special: SpecialIds, config: AdaptConfig) -> None:
        """Work out the lengths and cut the corpus.

        Raises:
            ConfigError: the lengths are too small for one span, or the targets do not fit.
            DataError: the tokenizer has too few sentinels.
        """
        lengths = span_lengths(config)
        self._counts = span_counts(
            lengths.num_tokens, config.noise_density, config.mean_noise_span_length
        )
        if special.first_sentinel is None or self._counts.num_spans > special.num_sentinels:
            raise DataError(
                f"inputs_length {config.inputs_length} makes {self._counts.num_spans} spans, but "
                f"the tokenizer has {special.num_sentinels} sentinels (<extra_id_0>, ..., with ids "
                "that count down, as T5's do and ByT5's do not), and each span needs its own. "
                "Lower inputs_length or noise_density, raise mean_noise_span_length, or use a "
                "tokenizer with more."
            )
        self._corpus = corpus
        self._eos, self._first_sentinel = special.eos, special.first_sentinel
        self._start = special.start
        self._pieces = EqualPieces(corpus.num_tokens, lengths.num_tokens)
        num_kept = lengths.num_tokens - self._counts.num_noise
        self.inputs_length = num_kept + self._counts.num_spans + 1
        self.targets_length = lengths.num_targets

    @property
    def num_examples(self) -> int:
        """Of an epoch."""
        return len(self._pieces)

    def plan(self, order: Order, first: int, num_rows: int) -> BatchPlan:
        """`num_rows` rows of one example each."""
        stretches = self._pieces.stretches(order.indices(first, num_rows))
        num_real_tokens = num_rows * (self.inputs_length + self.targets_length)
        return BatchPlan(num_rows, first, first + num_rows, order.seed, stretches, num_real_tokens)

    def plan_of_examples(self, order: Order, num_examples: int) -> BatchPlan:
        """The first so many examples."""
        return self.plan(order, 0, num_examples)

    def rows(self, plan: BatchPlan, first: int, last: int) -> RowBatch:
        """Rows [first, last) of a plan."""
        num_tokens = self._counts.num_tokens
        starts = plan.stretches.starts[first:last].tolist()
        ids_BN = np.stack([self._corpus.tokens(start, start + num_tokens) for start in starts])
        mask_BN = random_spans_masks(
            self._counts, plan.seed, plan.first_example + first, last - first
        )
        inputs_BS, targets_BT = map(
            self._with_eos, corrupt_spans(ids_BN, mask_BN, self._first_sentinel)
        )
        decoder_inputs_BT = np.roll(targets_BT, 1, axis=1)
        decoder_inputs_BT[:, 0] = self._start
        return RowBatch(
            decoder_input_ids_BT=torch.from_numpy(decoder_inputs_BT),
            labels_BT=torch.from_numpy(targets_BT),
            target_segments_BT=torch.from_numpy(np.ones_like(targets_BT)),
            is_packed=False,
            has_padding=False,
            num_real_tokens=inputs_BS.size + targets_BT.size,
            input_ids_BS=torch.from_numpy(inputs_BS),
            input_segments_BS=torch.from_numpy(np.ones_like(inputs_BS)),
        )

    def _with_eos(self, ids_BL: IdArray) -> IdArray:
        return np.pad(ids_BL, ((0, 0), (0, 1)), constant_values=self._eos)


def span_counts(num_tokens: int, noise_density: float, mean_noise_span_length: float) -> SpanCounts:
    """How much noise T5's `random_spans_noise_mask` makes, and in how many spans."""
    num_noise = min(max(round(num_tokens * noise_density), 1), num_tokens - 1)
    num_spans = max(round(num_noise / mean_noise_span_length), 1)
    return SpanCounts(num_tokens, num_noise, min(num_spans, num_tokens - num_noise))


def span_lengths(config: AdaptConfig) -> SpanLengths:
    """Tokens to cut for an example, and the length of its targets.

    Raises:
        ConfigError: see `SpanCorruption`.
    """
    density, mean = config.noise_density, config.mean_noise_span_length
    if not _holds_whole_spans(config.inputs_length, density, mean):
        longer = range(config.inputs_length + 1, LONGEST_TO_PROPOSE)
        enough = next((n for n in longer if _holds_whole_spans(n, density, mean)), None)
        remedy = f"Set inputs_length to {enough}, or choose" if enough else "Choose"
        raise ConfigError(
            f"inputs_length {config.inputs_length} at noise_density {density} and "
            f"mean_noise_span_length {mean} cannot hold one whole span of noise between kept "
            f"tokens. {remedy} noise_density and mean_noise_span_length nearer to 0.15 and 3."
        )
    lengths = random_spans_helper(config.inputs_length, density, mean)
    if lengths.num_targets > config.targets_length:
        raise ConfigError(
            f"inputs_length {config.inputs_length} at noise_density {density} makes targets of "
            f"{lengths.num_targets} tokens, but targets_length is {config.targets_length}. Set "
            f"targets_length to {lengths.num_targets}, or lower inputs_length."
        )
    return lengths


def _holds_whole_spans(inputs_length: int, noise_density: float, mean_length: float) -> bool:
    """Whether masks have as much noise, in as many spans, as the lengths were worked out for."""
    num_tokens = random_spans_helper(inputs_length, noise_density, mean_length).num_tokens
    num_noise = round(num_tokens * noise_density)
    num_spans = round(num_noise / mean_length)
    return (num_noise, num_spans) == span_counts(num_tokens, noise_density, mean_length)[1:]
