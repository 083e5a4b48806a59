"""T5's span corruption as pure functions of tokens and a mask (t5/data/preprocessors.py)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]


class DenoisingExample(NamedTuple):
    """What the encoder reads and what the decoder must write; without end-of-sequence."""

    input_ids: IdArray
    target_ids: IdArray


class SpanLengths(NamedTuple):
    """Lengths at which span corruption needs no padding."""

    num_tokens: int
    """Tokens to cut from the corpus for one example."""
    num_targets: int
    """Length of the targets, end-of-sequence included."""


def random_spans_helper(
    inputs_length: int,
    noise_density: float,
    mean_noise_span_length: float,
    extra_tokens_per_span_inputs: int = 1,
    extra_tokens_per_span_targets: int = 1,
) -> SpanLengths:
    """How many tokens to corrupt so that inputs with end-of-sequence are `inputs_length` long."""

    def lengths(num_tokens: int) -> tuple[int, int]:
        num_noise = round(num_tokens * noise_density)
        num_spans = round(num_noise / mean_noise_span_length)
        inputs = num_tokens - num_noise + num_spans * extra_tokens_per_span_inputs + 1
        return inputs, num_noise + num_spans * extra_tokens_per_span_targets + 1

    num_tokens = inputs_length - 1
    while lengths(num_tokens + 1)[0] <= inputs_length:
        num_tokens += 1
    num_targets = lengths(num_tokens)[1]
    # As in T5: at half noise, inputs and targets get equal lengths.
    if noise_density == 0.5 and num_targets > inputs_length:
        return SpanLengths(num_tokens - 1, num_targets - 1)
    return SpanLengths(num_tokens, num_targets)


def corrupt_spans(token_ids: IdArray, mask: MaskArray, first_sentinel_id: int) -> DenoisingExample:
    """Replace every noise span by a sentinel; the targets say what each sentinel stood for.

    Sentinels count down from `first_sentinel_id`. Targets have no final one where noise is last.
    Tokens and mask may have a leading axis of rows with equally much noise in equally many spans.
    """
    return DenoisingExample(
        _spans_to_sentinels(token_ids, mask, first_sentinel_id),
        _spans_to_sentinels(token_ids, ~mask, first_sentinel_id),
    )


def _spans_to_sentinels(token_ids: IdArray, mask: MaskArray, first_sentinel_id: int) -> IdArray:
    starts = mask.copy()
    starts[..., 1:] &= ~mask[..., :-1]
    sentinels = first_sentinel_id + 1 - np.cumsum(starts, axis=-1)
    kept = np.where(starts, sentinels, token_ids)[starts | ~mask]
    return kept.reshape(*token_ids.shape[:-1], -1)
