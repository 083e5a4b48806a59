"""Everything a tuning run is made of, built in one place and checked before step 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from softprompt_dist.config import TuneConfig, TuningBatchConfig
from softprompt_dist.data.batching import TokenBatch, TokenExample, collate, silent
from softprompt_dist.data.bucketing import MicroBatchLimit, dealt, micro_batches_by_length
from softprompt_dist.data.encoding import encode_texts
from softprompt_dist.data.mixture import MixtureOrder, mixing_rates
from softprompt_dist.data.sources import SPLITS
from softprompt_dist.data.tokenizer_identity import tokenizer_identity
from softprompt_dist.errors import ConfigError, DataError, InvariantError
from softprompt_dist.identity import Accept, Identity, accept_any
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.parallel.equality import assert_equal_on_all_ranks, assert_same_on_all_ranks
from softprompt_dist.prompt.initialise import initialise_prompt
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.loaded_task import LoadedTask, Split, TextReader, read_task
from softprompt_dist.run.optimizer import build_optimizer
from softprompt_dist.run.random_state import derived_random_state, restore_random_state
from softprompt_dist.run.room import assert_room, scoring_budget
from softprompt_dist.run.scoring import Prediction, Scorer, pad_id_of
from softprompt_dist.run.transfer import transfer_target


@dataclass(frozen=True)
class Bench:
    """A checked recipe with its tasks and frozen backbone: all that scoring a prompt takes."""

    config: TuneConfig
    reader: TextReader
    tasks: tuple[LoadedTask, ...]
    """The recipe's task, then those of its mixture; none where texts come from elsewhere."""
    backbone: Backbone
    identity: Identity
    """Of the backbone with its tokenizer."""
    scorer: Scorer
    transfers: tuple[LoadedTask, ...] = ()
    """What the tuned prompt is scored on besides, each with one split."""

    @property
    def task(self) -> LoadedTask:
        """The recipe's."""
        return self.tasks[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's."""
        return self.reader.tokenizer

    def predict(
        self, prompt: SoftPrompt, task: LoadedTask, split: Split, what: str
    ) -> list[Prediction]:
        """All ranks: what the prompt answers to a split of the task; `what` is told meanwhile."""
        rule = dataclasses.replace(task.rule, max_target_tokens=split.max_target_tokens)
        return self.scorer.predict(prompt, split.tokens, rule, what)


@dataclass(frozen=True)
class TuningRun(Bench):
    """A bench with a prompt on it. Only `prompt` (and its optimizer's state) ever changes."""

    prompt: SoftPrompt = field(kw_only=True)
    optimizer: torch.optim.Optimizer = field(kw_only=True)
    order: MixtureOrder = field(kw_only=True)
    """Of the training examples of all tasks."""
    backbone_checksum: str = field(kw_only=True)

    def batches(self, examples_consumed: int) -> list[TokenBatch]:
        """This rank's micro-batches of the global batch that starts at `examples_consumed`.

        Which examples make the global batch does not depend on the ranks. Within it, examples of
        about one length make a micro-batch, so that it holds little padding; micro-batches of about
        one size are computed at a time, and dealt back and forth, so that the ranks end together.
        Every rank has as many; one may be a row that counts nothing.
        """
        size = self.config.batch.global_batch_size
        rows = [
            self.tasks[task].splits["train"].tokens[index]
            for task, index in self.order.pairs(examples_consumed, size)
        ]
        micro_batches = micro_batches_by_length(
            [len(row.input_ids) for row in rows],
            [len(row.target_ids) for row in rows],
            self._limit,
            ranks.world_size(),
        )
        mine = dealt(micro_batches, ranks.rank(), ranks.world_size())
        return [self._collate([rows[i] for i in chosen]) for chosen in mine]

    @property
    def _limit(self) -> MicroBatchLimit:
        batch = self.config.batch
        if batch.micro_batch_tokens is None:
            return MicroBatchLimit(rows=batch.micro_batch_size)
        length = self.config.prompt.prompt_length
        return MicroBatchLimit(positions=batch.micro_batch_tokens, prompt_length=length)

    def _collate(self, rows: Sequence[TokenExample]) -> TokenBatch:
        pad_id, family = pad_id_of(self.tokenizer), self.backbone.family
        if rows:
            return collate(rows, pad_id=pad_id, family=family)
        anything = self.task.splits["train"].tokens[0]
        return silent(collate([anything], pad_id=pad_id, family=family))


def check_world(config: TuneConfig | AdaptConfig, world_size: int) -> None:
    """Refuse a world size that does not divide the global batch.

    Raises:
        ConfigError: with the micro-batch sizes and world sizes that would work.
    """
    batch = config.batch
    if isinstance(batch, TuningBatchConfig) and batch.micro_batch_tokens is not None:
        return  # micro-batches are cut for as many ranks as there are
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
    config: TuneConfig,
    ds_config: dict[str, Any] | None = None,
    *,
    splits: Sequence[str] | None = SPLITS,
    for_tuning: bool = False,
    accept: Accept = accept_any,
) -> Bench:
    """All ranks: tasks, tokenizer and frozen backbone of a recipe.

    Args:
        config: the checked recipe.
        ds_config: engine plumbing, or None for ours.
        splits: of the recipe's task; None for no task at all.
        for_tuning: the tasks of the mixture too, those to transfer to, and refuse a machine without
            room for a step of tuning.
        accept: is given the backbone's identity, on rank 0, before its weights are read.

    Raises:
        SoftpromptError: anything in the recipe, data, backbone or machine that cannot work.
    """
    if ds_config is None:
        held = config.backbone.held_by(ranks.world_size())
        config = config.model_copy(update={"backbone": held})
    texts = _read_texts(config, splits, for_tuning=for_tuning)
    if for_tuning:
        ranks.together(lambda: assert_room(config, texts.folder, texts.tasks))
    stop.end_here_if_asked("reading the rows")
    tokenizer = texts.reader.tokenizer
    known = ranks.together(lambda: tokenizer_identity(tokenizer))

    def with_tokenizer(identity: Identity) -> Identity:
        return dataclasses.replace(identity, tokenizer=known)

    backbone = load_backbone(
        config.backbone, ds_config, lambda identity: accept(with_tokenizer(identity))
    )
    stop.end_here_if_asked("loading the backbone")
    identity = with_tokenizer(backbone.identity)
    assert_same_on_all_ranks(identity.digest, "The digest of the backbone's identity")
    ranks.together(lambda: _check_positions(config, backbone, [*texts.tasks, *texts.transfers]))
    budget = scoring_budget(config, texts.folder)
    evaluation = config.evaluation.model_copy(update={"batch_tokens": budget})
    config = config.model_copy(update={"evaluation": evaluation})
    scorer = Scorer(backbone, tokenizer, budget)
    return Bench(config, texts.reader, texts.tasks, backbone, identity, scorer, texts.transfers)


@dataclass(frozen=True)
class _Texts:
    """What a bench reads before any weight."""

    folder: Path
    reader: TextReader
    tasks: tuple[LoadedTask, ...]
    transfers: tuple[LoadedTask, ...]


def _read_texts(config: TuneConfig, splits: Sequence[str] | None, *, for_tuning: bool) -> _Texts:
    configs = [] if splits is None else [config.task]
    configs += config.mixture.tasks if for_tuning else []
    transfers = config.transfer if for_tuning else []
    scored = list(splits or SPLITS)
    # Rows before the backbone, which may take long to fetch: what is wrong with them is said first.
    several = len(configs) + len(transfers) > 1
    data = [read_task(task, scored, of_several=several) for task in configs]
    elsewhere = [read_task(t.task, [t.split], of_several=several) for t in transfers]
    folder = locate_backbone(config.backbone)
    tokenizer = ranks.together(lambda: load_tokenizer(folder))
    reader = TextReader(config, tokenizer, ranks.together(lambda: family_of(folder)))
    tasks = tuple(
        reader.load(task, texts, scored) for task, texts in zip(configs, data, strict=True)
    )
    targets = tuple(
        transfer_target(reader, tasks[0], transfer, texts)
        for transfer, texts in zip(transfers, elsewhere, strict=True)
    )
    return _Texts(folder, reader, tasks, targets)


def build_tuning_run(
    config: TuneConfig, ds_config: dict[str, Any] | None = None, accept: Accept = accept_any
) -> TuningRun:
    """All ranks: a bench, the prompt on it and its optimizer, with the invariants checked.

    `accept`: see `build_bench`.

    Raises:
        SoftpromptError: see `build_bench`; or the ranks do not divide the batch.
    """
    ranks.together(lambda: check_world(config, ranks.world_size()))
    bench = build_bench(config, ds_config, for_tuning=True, accept=accept)
    rank, world_size = ranks.rank(), ranks.world_size()
    restore_random_state(derived_random_state(config.seed, 0, rank, world_size))
    prompt = SoftPrompt(_initial_prompt(bench)).to(ranks.device())
    num_examples = [len(task.splits["train"].texts) for task in bench.tasks]
    run = TuningRun(
        **vars(bench),
        prompt=prompt,
        optimizer=build_optimizer(config.optimizer, [prompt.weight]),
        order=MixtureOrder(num_examples, mixing_rates(num_examples, config.mixture), config.seed),
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
    trainable = [name for name, t in run.backbone.tensors().items() if t.requires_grad]
    prompt = run.prompt.weight
    if trainable or not prompt.requires_grad or prompt.dtype != torch.float32:
        raise InvariantError(
            f"Only the prompt may train, in fp32: backbone weights {trainable[:5]} require "
            f"gradients; the prompt: requires_grad={prompt.requires_grad}, {prompt.dtype}."
        )


def _check_positions(config: TuneConfig, backbone: Backbone, tasks: Sequence[LoadedTask]) -> None:
    limit = backbone.position_limit
    longest = max((_longest_row(task) for task in tasks), default=0)
    needed = config.prompt.prompt_length + longest
    if limit is not None and needed > limit.positions:
        raise DataError(
            f"prompt.prompt_length {config.prompt.prompt_length} and the longest input with its "
            f"answer, {longest} tokens, make {needed} positions, but {limit.reason}. Lower "
            f"backbone.max_input_tokens by {needed - limit.positions} or more, or "
            "prompt.prompt_length."
        )


def _longest_row(task: LoadedTask) -> int:
    """Tokens of the longest input with its target, or with an answer that may be found for it."""
    splits = task.splits.values()
    tuned = max(int((s.tokens.input_lengths + s.tokens.target_lengths).max()) for s in splits)
    answered = max(int(s.tokens.input_lengths.max()) for s in splits) + task.rule.answer_tokens
    return max(tuned, answered)


def _initial_prompt(bench: Bench) -> Tensor:
    """Drawn once on every rank, then rank 0's is taken by all."""
    initial_PD = initialise_prompt(
        bench.config.prompt,
        embed=bench.backbone.embed,
        vocabulary_size=bench.backbone.vocabulary_size,
        encode=lambda text: encode_texts([text], bench.tokenizer)[0],
        labels=tuple(
            dict.fromkeys(
                x for task in bench.tasks for x in bench.reader.spelt(task.config, task.data.labels)
            )
        ),
        d_model=bench.backbone.d_model,
        generator=torch.Generator().manual_seed(bench.config.seed),
    )
    return ranks.broadcast(initial_PD.to(ranks.device()).contiguous())
