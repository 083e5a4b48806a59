"""A corpus as global batches of rows, each a pure function of (seed, corpus, examples consumed)."""

from __future__ import annotations

from collections.abc import Iterator

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.data.lm.next_token import NextToken
from softprompt_dist.data.lm.order import AsTheyCome, GlobalOrder
from softprompt_dist.data.lm.plan import BatchPlan, Objective
from softprompt_dist.data.lm.prefix_lm import PrefixLM, PrefixLMPairs
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.span_corruption import SpanCorruption
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.token_source import TokenSource
from softprompt_dist.errors import DataError


class LMData:
    """A corpus seen through an objective.

    What a batch holds depends on neither ranks nor micro-batches, and one number resumes it.
    """

    def __init__(self, corpus: TokenSource, special: SpecialIds, config: AdaptConfig) -> None:
        """Cut the corpus into examples.

        Raises:
            ConfigError: the lengths of `config` do not suit its objective or packing.
            DataError: the corpus makes no example, or the tokenizer has too few sentinels.
        """
        self._corpus = corpus
        self._objective = _objective(corpus, special, config)
        if not self._objective.num_examples:
            raise self._too_short("not one example")
        self._order = GlobalOrder(self.num_examples, config.seed, corpus.fingerprint)

    @property
    def num_examples(self) -> int:
        """Of an epoch."""
        return self._objective.num_examples

    @property
    def inputs_length(self) -> int | None:
        """Encoder positions of a row; None without encoder."""
        return self._objective.inputs_length

    @property
    def targets_length(self) -> int:
        """Decoder positions of a row."""
        return self._objective.targets_length

    def require_rows(self, num_rows: int) -> None:
        """Refuse a corpus that does not fill `num_rows` rows once.

        Raises:
            DataError: it has too little text.
        """
        if self.plan(0, num_rows).examples_consumed > self.num_examples:
            raise self._too_short(f"fewer than the {num_rows:,} rows of one batch need")

    def plan(self, examples_consumed: int, num_rows: int) -> BatchPlan:
        """The global batch that begins behind `examples_consumed` examples; reads no token."""
        return self._objective.plan(self._order, examples_consumed, num_rows)

    def rows(self, plan: BatchPlan, first: int, last: int) -> RowBatch:
        """Rows [first, last) of a plan."""
        return self._objective.rows(plan, first, last)

    def validation_plan(self, max_examples: int) -> BatchPlan:
        """The first examples of the text, with the same random choices whatever the seed.

        Raises:
            DataError: they do not make a row.
        """
        chosen = min(max_examples, self.num_examples)
        plan = self._objective.plan_of_examples(AsTheyCome(), chosen)
        if not plan.num_rows:
            raise self._too_short("too few for one row")
        return plan

    def validation_batches(self, max_examples: int, micro_batch_size: int) -> Iterator[RowBatch]:
        """The rows of `validation_plan`; the last batch may be smaller."""
        plan = self.validation_plan(max_examples)
        for first in range(0, plan.num_rows, micro_batch_size):
            yield self.rows(plan, first, min(first + micro_batch_size, plan.num_rows))

    def _too_short(self, verdict: str) -> DataError:
        return DataError(
            f"The corpus has {self._corpus.num_tokens:,} tokens in "
            f"{self._corpus.num_documents:,} documents, which make "
            f"{self._objective.num_examples:,} examples: {verdict}. Give more text, or lower "
            "batch.global_batch_size, inputs_length or targets_length."
        )


def _objective(corpus: TokenSource, special: SpecialIds, config: AdaptConfig) -> Objective:
    lengths = config.inputs_length, config.targets_length
    if config.objective == "span_corruption":
        return SpanCorruption(corpus, special, config)
    if config.objective == "lm":
        return NextToken(corpus, special, config.targets_length)
    if config.packing == "complementary_pairs":
        return PrefixLMPairs(corpus, special, *lengths)
    return PrefixLM(corpus, special, *lengths, greedy=config.packing == "greedy")
