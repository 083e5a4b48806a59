"""T5's denoising objectives as pure functions of tokens and a mask (t5/data/preprocessors.py).

Random choices are drawn by `example_generator`, so an example depends on nothing but (seed,
position): not on the rank, the world size, the micro batch or what was drawn before.
"""

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


def example_generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the example at `position` of the run, and of no other."""
    key = np.array([seed, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


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


def random_spans_mask(
    num_tokens: int,
    noise_density: float,
    mean_noise_span_length: float,
    generator: np.random.Generator,
) -> MaskArray:
    """True where a token is noise; kept and noise spans alternate, a kept one first, noise last."""
    if num_tokens < 2:
        return np.zeros(num_tokens, dtype=np.bool_)
    num_noise = min(max(round(num_tokens * noise_density), 1), num_tokens - 1)
    num_spans = min(max(round(num_noise / mean_noise_span_length), 1), num_tokens - num_noise)
    kept = _random_composition(num_tokens - num_noise, num_spans, generator)
    noise = _random_composition(num_noise, num_spans, generator)
    lengths = np.stack([kept, noise], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], num_spans), lengths)


def corrupt_spans(token_ids: IdArray, mask: MaskArray, first_sentinel_id: int) -> DenoisingExample:
    """Replace every noise span by a sentinel; the targets say what each sentinel stood for.

    Sentinels count down from `first_sentinel_id`. Targets have no final one where noise is last.
    Tokens and mask may have a leading axis of rows with equally much noise in equally many spans.
    """
    return DenoisingExample(
        _spans_to_sentinels(token_ids, mask, first_sentinel_id),
        _spans_to_sentinels(token_ids, ~mask, first_sentinel_id),
    )


def random_prefix_length(
    num_tokens: int, generator: np.random.Generator, noise_density: float = 0.5
) -> int:
    """Length of the prefix, uniform in [1, num_tokens - 1]; 0 where there is but one token."""
    if num_tokens < 2:
        return 0
    shortest = max(1, round((1 - 2 * noise_density) * (num_tokens - 1)))
    return int(generator.integers(shortest, num_tokens))


def split_prefix(token_ids: IdArray, prefix_length: int) -> DenoisingExample:
    """The first tokens are input, the rest target."""
    return DenoisingExample(token_ids[:prefix_length], token_ids[prefix_length:])


def append_eos_after_trim(token_ids: IdArray, max_length: int, eos_id: int) -> IdArray:
    """At most `max_length - 1` tokens, then end-of-sequence."""
    return np.append(token_ids[: max_length - 1], eos_id)


def _spans_to_sentinels(token_ids: IdArray, mask: MaskArray, first_sentinel_id: int) -> IdArray:
    starts = mask.copy()
    starts[..., 1:] &= ~mask[..., :-1]
    sentinels = first_sentinel_id + 1 - np.cumsum(starts, axis=-1)
    kept = np.where(starts, sentinels, token_ids)[starts | ~mask]
    return kept.reshape(*token_ids.shape[:-1], -1)


def _random_composition(total: int, parts: int, generator: np.random.Generator) -> IdArray:
    """`parts` positive integers of sum `total`, every choice equally likely."""
    cuts = np.sort(generator.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total).astype(np.int64)
