"""Everything a tuning run is made of, built in one place and checked before step 1."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.fingerprint import local_checksum
from softprompt_dist.backbone.load import (
    family_of,
    load_backbone,
    load_tokenizer,
    locate_backbone,
)
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.batching import Family, TokenBatch, TokenExample, collate, tokenise
from softprompt_dist.data.examples import Example
from softprompt_dist.data.order import ExampleOrder
from softprompt_dist.data.tasks import TaskData, load_task
from softprompt_dist.errors import ConfigError, DataError, InvariantError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.equality import assert_equal_on_all_ranks, assert_same_on_all_ranks
from softprompt_dist.prompt.initialise import initialise_prompt
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.optimizer import build_optimizer
from softprompt_dist.run.room import assert_room
from softprompt_dist.run.scoring import LabelSet, Scorer, pad_id_of

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Examples of one split, as text and as tokens."""

    texts: tuple[Example, ...]
    tokens: tuple[TokenExample, ...]

    def sample(self, count: int | None) -> Split:
        """`count` examples, or all: the same ones in every run, wherever they stand in the source.

        Not the first ones: many sources are sorted by label.
        """
        if count is None or count >= len(self.texts):
            return self
        indices = ExampleOrder(len(self.texts), seed=0).indices(0, count)
        return Split(tuple(self.texts[i] for i in indices), tuple(self.tokens[i] for i in indices))


@dataclass(frozen=True)
class Bench:
    """A checked recipe with its data and frozen backbone: all that scoring a prompt takes."""

    config: TuneConfig
    task: TaskData
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Split]
    backbone: Backbone
    scorer: Scorer


@dataclass(frozen=True)
class TuningRun(Bench):
    """A bench with a prompt on it. Only `prompt` (and its optimizer's state) ever changes."""

    prompt: SoftPrompt
    optimizer: torch.optim.Optimizer
    backbone_checksum: str

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank in one update."""
        batch = self.config.batch
        return batch.global_batch_size // (batch.micro_batch_size * ranks.world_size())

    def batches(self, examples_consumed: int) -> list[TokenBatch]:
        """This rank's micro-batches of the global batch that starts at `examples_consumed`.

        Which examples make the global batch does not depend on the ranks. Within it, examples of
        about one length make a micro-batch, so that it holds little padding; micro-batches of about
        one length are computed at a time, and dealt back and forth, so that the ranks end together.
        """
        train = self.splits["train"].tokens
        size = self.config.batch.micro_batch_size
        order = ExampleOrder(len(train), self.config.seed)
        indices = order.indices(examples_consumed, self.config.batch.global_batch_size)
        indices.sort(key=lambda index: len(train[index].input_ids), reverse=True)
        micro_batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [self._collate([train[i] for i in chosen]) for chosen in dealt(micro_batches)]

    def _collate(self, examples: list[TokenExample]) -> TokenBatch:
        batch = collate(examples, pad_id=pad_id_of(self.tokenizer), family=self.backbone.family)
        return batch.to(ranks.device())


def dealt(micro_batches: Sequence[T]) -> list[T]:
    """This rank's share of the longest-first micro-batches: one of each round, back and forth."""
    rank, world_size = ranks.rank(), ranks.world_size()
    rounds = range(0, len(micro_batches), world_size)
    places = (rank if turn % 2 == 0 else world_size - 1 - rank for turn in range(len(rounds)))
    return [micro_batches[start + place] for start, place in zip(rounds, places, strict=True)]


def check_world(config: TuneConfig | AdaptConfig, world_size: int) -> None:
    """Refuse a world size that does not divide the global batch.

    Raises:
        ConfigError: with the micro-batch sizes and world sizes that would work.
    """
    batch = config.batch
    per_update = batch.micro_batch_size * world_size
    if batch.global_batch_size % per_update:
        multiple = -(-batch.global_batch_size // per_update) * per_update
        raise ConfigError(
            f"batch.global_batch_size is {batch.global_batch_size}, but {world_size} ranks x "
            f"batch.micro_batch_size {batch.micro_batch_size} = {per_update} must divide it. Use "
            f"batch.global_batch_size={multiple}, another batch.micro_batch_size, or another "
            "number of ranks."
        )


def build_bench(
    config: TuneConfig, ds_config: dict[str, Any] | None = None, *, for_tuning: bool = False
) -> Bench:
    """All ranks: data, tokenizer and frozen backbone of a recipe.

    Args:
        config: the checked recipe.
        ds_config: engine plumbing, or None for ours.
        for_tuning: refuse a machine without room for a step of tuning.

    Raises:
        SoftpromptError: anything in the recipe, data, backbone or machine that cannot work.
    """
    # Rank 0 fetches what the source needs once; the others find it in the cache.
    ranks.on_main(lambda: bool(load_task(config.task)))
    task = ranks.together(lambda: load_task(config.task))
    folder = locate_backbone(config.backbone)
    tokenizer = ranks.together(lambda: load_tokenizer(folder))
    family = ranks.together(lambda: family_of(folder))
    splits, labels = ranks.together(lambda: _all_tokens(config, task, tokenizer, family))
    if for_tuning:
        ranks.together(lambda: assert_room(config, folder, splits))
    assert_same_on_all_ranks(task.digests, "The data")
    backbone = load_backbone(config.backbone, ds_config)
    assert_same_on_all_ranks(backbone.fingerprint, "The backbone's fingerprint")
    ranks.together(lambda: _check_positions(config, backbone, splits))
    evaluation = config.evaluation
    scorer = Scorer(backbone, tokenizer, labels, evaluation.method, evaluation.batch_tokens)
    return Bench(config, task, tokenizer, splits, backbone, scorer)


def build_tuning_run(config: TuneConfig, ds_config: dict[str, Any] | None = None) -> TuningRun:
    """All ranks: a bench, the prompt on it and its optimizer, with the invariants checked.

    Raises:
        SoftpromptError: see `build_bench`; or the ranks do not divide the batch.
    """
    ranks.together(lambda: check_world(config, ranks.world_size()))
    bench = build_bench(config, ds_config, for_tuning=True)
    torch.manual_seed(config.seed + ranks.rank())
    prompt = SoftPrompt(_initial_prompt(bench)).to(ranks.device())
    run = TuningRun(
        **vars(bench),
        prompt=prompt,
        optimizer=build_optimizer(config.optimizer, [prompt.weight]),
        backbone_checksum=local_checksum(bench.backbone),
    )
    ranks.together(lambda: assert_only_prompt_trains(run))
    assert_equal_on_all_ranks(prompt.weight, "The initial prompt")
    return run


def assert_only_prompt_trains(run: TuningRun) -> None:
    """The prompt is trainable, in fp32; no backbone weight is.

    Raises:
        InvariantError: naming the weights that would train.
    """
    trainable = [name for name, p in run.backbone.named_parameters() if p.requires_grad]
    prompt = run.prompt.weight
    if trainable or not prompt.requires_grad or prompt.dtype != torch.float32:
        raise InvariantError(
            f"Only the prompt may train, in fp32: backbone weights {trainable[:5]} require "
            f"gradients; the prompt: requires_grad={prompt.requires_grad}, {prompt.dtype}."
        )


def _all_tokens(
    config: TuneConfig, task: TaskData, tokenizer: PreTrainedTokenizerBase, family: Family
) -> tuple[dict[str, Split], LabelSet]:
    splits = {
        name: _tokenised(config, tokenizer, family, name, getattr(task, name))
        for name in ("train", "validation", "test")
    }
    return splits, _label_set(config, task, tokenizer, family)


def _check_positions(config: TuneConfig, backbone: Backbone, splits: dict[str, Split]) -> None:
    examples = [example for split in splits.values() for example in split.tokens]
    longest = max(len(e.input_ids) + len(e.target_ids) for e in examples)
    needed = config.prompt.prompt_length + longest
    limit = backbone.max_positions
    if limit is not None and needed > limit:
        raise DataError(
            f"prompt.prompt_length {config.prompt.prompt_length} and the longest input with "
            "its target, "
            f"{longest} tokens, make {needed} positions, but the backbone has {limit}. Lower "
            f"backbone.max_input_tokens by {needed - limit} or more, or prompt.prompt_length."
        )


def _tokenised(
    config: TuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    name: str,
    examples: tuple[Example, ...],
) -> Split:
    result = tokenise(
        examples,
        tokenizer,
        family=family,
        max_input_tokens=config.backbone.max_input_tokens,
        append_eos=config.task.append_eos,
    )
    if result.num_truncated and ranks.is_main():
        log.warning(
            "%d of %d %s inputs are longer than backbone.max_input_tokens=%d and were cut.",
            result.num_truncated,
            len(examples),
            name,
            config.backbone.max_input_tokens,
        )
    return Split(texts=examples, tokens=tuple(result.examples))


def _label_set(
    config: TuneConfig, task: TaskData, tokenizer: PreTrainedTokenizerBase, family: Family
) -> LabelSet:
    examples = tuple(Example(input_text=label, target_text=label) for label in task.labels)
    tokens = _tokenised(config, tokenizer, family, "label", examples).tokens
    return LabelSet(
        texts=tuple(label.strip() for label in task.labels),
        ids=tuple(tuple(example.target_ids) for example in tokens),
    )


def _initial_prompt(bench: Bench) -> Tensor:
    """Drawn once on every rank, then rank 0's is taken by all."""
    initial_PD = initialise_prompt(
        bench.config.prompt,
        embed=bench.backbone.embed,
        vocabulary_size=bench.backbone.vocabulary_size,
        encode=lambda text: bench.tokenizer.encode(text, add_special_tokens=False),
        labels=bench.task.labels,
        d_model=bench.backbone.d_model,
        generator=torch.Generator().manual_seed(bench.config.seed),
        backbone_fingerprint=bench.backbone.fingerprint,
    )
    return ranks.broadcast(initial_PD.to(ranks.device()).contiguous())
