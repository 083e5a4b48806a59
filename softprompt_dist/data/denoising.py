"""Batches of a denoising objective, each a pure function of (seed, corpus, position)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.data.corpus import Pieces, TokenisedCorpus, cut_concatenated, cut_documents
from softprompt_dist.data.lm.objectives import (
    DenoisingExample,
    append_eos_after_trim,
    corrupt_spans,
    example_generator,
    random_prefix_length,
    random_spans_helper,
    random_spans_mask,
    split_prefix,
)
from softprompt_dist.data.order import ExampleOrder
from softprompt_dist.errors import DataError


@dataclass(frozen=True)
class SpecialIds:
    """Ids that the objectives put in."""

    pad: int
    eos: int
    first_sentinel: int

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialIds:
        """Those of a T5 tokenizer.

        Raises:
            DataError: the tokenizer has no padding, end-of-sequence or sentinel piece.
        """
        first_sentinel = tokenizer.get_vocab().get("<extra_id_0>")
        found = (tokenizer.pad_token_id, tokenizer.eos_token_id, first_sentinel)
        if None in found:
            raise DataError(
                f"The tokenizer lacks one of pad, eos, <extra_id_0> (found {found}); this needs a "
                "T5 tokenizer. Set `tokenizer` to a T5 tokenizer folder."
            )
        return cls(*found)


class DenoisingData:
    """A corpus seen through an objective: examples by position, batches of fixed shape."""

    def __init__(self, corpus: TokenisedCorpus, special: SpecialIds, config: AdaptConfig) -> None:
        """Cut the corpus into pieces, as the objective of `config` wants them.

        Raises:
            DataError: the corpus is too short, or there are too few sentinels or target positions.
        """
        self._config = config
        self._special = special
        self.targets_length = config.targets_length
        if config.objective == "span_corruption":
            self._pieces = self._cut_for_spans(corpus)
        else:
            self._pieces = cut_documents(corpus, config.inputs_length - 1)
        self._order = ExampleOrder(len(self._pieces), config.seed)

    def __len__(self) -> int:
        """Number of examples in an epoch."""
        return len(self._pieces)

    @property
    def tokens_per_example(self) -> float:
        """Corpus tokens in an example, on average."""
        return float((self._pieces.ends - self._pieces.starts).mean())

    def examples(self, start: int, count: int) -> list[DenoisingExample]:
        """Examples at positions [start, start + count), with end-of-sequence on both sides."""
        indices = self._order.indices(start, count)
        return [self._example(i, start + n) for n, i in enumerate(indices)]

    def batch(self, start: int, count: int) -> TokenBatch:
        """The same as one batch of [count, inputs_length] and [count, targets_length]."""
        examples = self.examples(start, count)
        inputs = [example.input_ids for example in examples]
        targets = [example.target_ids for example in examples]
        return TokenBatch(
            *self._stack(inputs, self._config.inputs_length),
            *self._stack(targets, self.targets_length),
        )

    def _cut_for_spans(self, corpus: TokenisedCorpus) -> Pieces:
        config = self._config
        lengths = random_spans_helper(
            config.inputs_length, config.noise_density, config.mean_noise_span_length
        )
        if lengths.num_targets > config.targets_length:
            raise DataError(
                f"inputs_length {config.inputs_length} at noise_density {config.noise_density} "
                f"makes targets of {lengths.num_targets} tokens, but targets_length is "
                f"{config.targets_length}. Raise targets_length or lower inputs_length."
            )
        return cut_concatenated(corpus, lengths.num_tokens)

    def _example(self, index: int, position: int) -> DenoisingExample:
        config, ids = self._config, self._pieces[index]
        generator = example_generator(config.seed, position)
        if config.objective == "span_corruption":
            mask = random_spans_mask(
                len(ids), config.noise_density, config.mean_noise_span_length, generator
            )
            example = corrupt_spans(ids, mask, self._special.first_sentinel)
        else:
            example = split_prefix(ids, random_prefix_length(len(ids), generator))
        return DenoisingExample(
            append_eos_after_trim(example.input_ids, config.inputs_length, self._special.eos),
            append_eos_after_trim(example.target_ids, config.targets_length, self._special.eos),
        )

    def _stack(self, rows: list[Any], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BL = np.full((len(rows), width), self._special.pad, dtype=np.int64)
        mask_BL = np.zeros((len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            ids_BL[number, : len(row)] = row
            mask_BL[number, : len(row)] = 1
        return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)
