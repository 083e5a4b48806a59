"""A task as runs use it: its examples as text and as tokens, and how answers are found and judged.

Functions that say "all ranks" hold collectives.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from softprompt_dist.config import EvaluationConfig, TuneConfig
from softprompt_dist.data.batching import Family, bos_ids, target_prefix_ids, tokenise
from softprompt_dist.data.examples import Example
from softprompt_dist.data.floors import has_floors
from softprompt_dist.data.order import ExampleOrder
from softprompt_dist.data.tasks import TaskData, load_task, task_reader
from softprompt_dist.data.textless import without_textless
from softprompt_dist.data.token_cache import tokens_of
from softprompt_dist.data.token_table import TokenTable
from softprompt_dist.data.wording import spelt_targets, tell_of_special_pieces
from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.answer_text import translate
from softprompt_dist.metrics.registry import find_metrics
from softprompt_dist.metrics.scores import Scores, measure
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.equality import assert_same_on_all_ranks
from softprompt_dist.run.label_checks import check_labels
from softprompt_dist.run.scoring import AnswerRule, LabelSet, Prediction
from softprompt_dist.task_config import TaskConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Examples of one split, as text and as tokens."""

    texts: Sequence[Example]
    tokens: TokenTable
    max_target_tokens: int
    """Generated answers to it end here, whichever other splits were read."""

    def sample(self, count: int | None) -> Split:
        """About `count` examples, or all: the same in every run, wherever they are in the source.

        Not the first ones: many sources are sorted by label. Examples that are judged together
        (those of a question, facts["group"]) are taken together, so there may be a few more.
        """
        if count is None or count >= len(self.texts):
            return self
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(self.texts):
            groups.setdefault(str(example.facts.get("group", f"alone {index}")), []).append(index)
        members = list(groups.values())
        chosen: list[int] = []
        for group in ExampleOrder(len(members), seed=0).indices(0, len(members)):
            chosen += members[group]
            if len(chosen) >= count:
                break
        return Split(
            [self.texts[index] for index in chosen],
            TokenTable.of([self.tokens[index] for index in chosen]),
            self.max_target_tokens,
        )


@dataclass(frozen=True)
class LoadedTask:
    """A task's data in those splits that were asked for, and its rules."""

    config: TaskConfig
    data: TaskData
    splits: Mapping[str, Split]
    rule: AnswerRule
    translation: Mapping[str, str] = field(default_factory=dict)
    """What texts in answers mean for this task."""

    @property
    def name(self) -> str:
        """The task's."""
        return self.data.name

    def spoken(self, texts: Sequence[str]) -> list[str]:
        """Answers in this task's words; white space at the ends does not count."""
        return [translate(text.strip(), self.translation) for text in texts]

    def judge(
        self,
        predictions: Sequence[Prediction],
        examples: Sequence[Example],
        *,
        num_resamples: int = 0,
    ) -> Scores:
        """Scores by the task's own metrics; see `measure`."""
        texts = self.spoken([prediction.text for prediction in predictions])
        answers = [
            Answer(text, example.target_text.strip(), example.facts)
            for text, example in zip(texts, examples, strict=True)
        ]
        return measure(self.data.metrics, answers, self.labels, num_resamples=num_resamples)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set as answers spell it."""
        return tuple(label.strip() for label in self.data.labels)


def read_task(config: TaskConfig, splits: Sequence[str], *, of_several: bool = False) -> TaskData:
    """All ranks: a task's rows as text, the same on every rank.

    Train is among them for the floors, if the task has any and the source has it: a floor fitted on
    the rows that it is asked about would be none.

    Args:
        config: the task.
        splits: those that are scored or tuned on.
        of_several: whether a message must say which task it is about.

    Raises:
        SoftpromptError: see `load_task`; or the ranks have read different rows.
    """

    def load() -> TaskData:
        reader = task_reader(config)
        floors = ["train"] if has_floors(reader.labels, reader.metrics) else []
        try:
            return load_task(config, splits, if_there=floors)
        except DataError as error:
            if not of_several:
                raise
            raise DataError(f"Task {config.name!r}: {error}") from error

    found: list[TaskData] = []
    # Rank 0 fetches what the source needs once; the others find it in the cache.
    ranks.on_main(lambda: found.append(load()))
    data = ranks.together(lambda: found[0] if found else load())
    assert_same_on_all_ranks(dict(data.digests), f"The data of task {data.name}")
    return data


@dataclass(frozen=True)
class TextReader:
    """How a run turns text to tokens, and answers to rules."""

    config: TuneConfig
    tokenizer: PreTrainedTokenizerBase
    family: Family

    def load(
        self,
        config: TaskConfig,
        data: TaskData,
        splits: Sequence[str],
        translation: Mapping[str, str] | None = None,
    ) -> LoadedTask:
        """All ranks: the examples of a task's `splits` as tokens, and its rules.

        Raises:
            SoftpromptError: see `tokenise`; or the way of finding or judging answers does not suit
                the task.
        """
        tell_of_special_pieces(config, data.labels, self.tokenizer)
        tokens = {}
        for name in splits:
            data, tokens[name] = self._tokens(config, name, data)

        def judged_once() -> LoadedTask:
            labels = self._labels(config, data)
            read = {
                name: Split(
                    data.splits[name], table, self._max_target_tokens(config, labels, table)
                )
                for name, table in tokens.items()
            }
            longest = max(split.max_target_tokens for split in read.values())
            rule = self.answer_rule(config, labels, longest)
            task = LoadedTask(config, data, read, rule, translation or {})
            # A metric that lacks something says so now, not at the first validation.
            for split in read.values():
                task.judge([Prediction("")], split.texts[:1])
            return task

        return ranks.together(judged_once)

    def _tokens(self, task: TaskConfig, split: str, data: TaskData) -> tuple[TaskData, TokenTable]:
        table = self._table(task, split, data.splits[split])
        if not table.left_out:
            return data, table
        found = ranks.together(
            lambda: without_textless(data, split, table.left_out, task, self.tokenizer)
        )
        return found, self._table(task, split, found.splits[split])

    def _table(self, task: TaskConfig, split: str, examples: Sequence[Example]) -> TokenTable:
        table = tokens_of(
            self._spelt_examples(task, examples),
            self.tokenizer,
            family=self.family,
            max_input_tokens=self.config.backbone.max_input_tokens,
            append_eos=task.append_eos,
            target_prefix=task.target_prefix,
            input_start=self.input_start,
        )
        if table.num_truncated and ranks.is_main():
            log.warning(
                "%d of %d %s inputs of %s are longer than backbone.max_input_tokens=%d and were "
                "cut.",
                table.num_truncated,
                len(examples),
                split,
                task.name,
                self.config.backbone.max_input_tokens,
            )
        return table

    @cached_property
    def input_start(self) -> tuple[int, ...]:
        """What every input begins with; see `bos_ids`."""
        return bos_ids(self.tokenizer, self.family, self.config.backbone.prepend_bos)

    def spelt(self, task: TaskConfig, targets: Sequence[str]) -> Sequence[str]:
        """See `spelt_targets`."""
        return spelt_targets(targets, task, self.tokenizer, self.family)

    def _spelt_examples(self, task: TaskConfig, examples: Sequence[Example]) -> Sequence[Example]:
        texts = [example.target_text for example in examples]
        targets = self.spelt(task, texts)
        if targets == texts:
            return examples
        return [replace(e, target_text=t) for e, t in zip(examples, targets, strict=True)]

    def _labels(self, task: TaskConfig, data: TaskData) -> LabelSet:
        find_metrics(data.metrics, data.labels)
        labels = self.label_set(task, data.labels)
        check_method(self.config.evaluation, task, data.labels)
        return labels

    def _max_target_tokens(self, task: TaskConfig, labels: LabelSet, split: TokenTable) -> int:
        longest = max([int(split.target_lengths.max()), *map(len, labels.ids)])
        return self.max_target_tokens(task, longest)

    def max_target_tokens(self, task: TaskConfig, longest: int) -> int:
        """Where generated answers end: where the recipe says, after the prefix; else `longest`."""
        limit = self.config.evaluation.max_target_tokens
        return longest if limit is None else limit + len(self.prefix_ids(task))

    def answer_rule(self, task: TaskConfig, labels: LabelSet, max_target_tokens: int) -> AnswerRule:
        """How answers to the task are found."""
        evaluation = self.config.evaluation
        normalisation = evaluation.length_normalisation
        return AnswerRule(
            evaluation.method, labels, max_target_tokens, normalisation, task.target_prefix
        )

    def prefix_ids(self, task: TaskConfig) -> tuple[int, ...]:
        """What the task's targets and answers begin with; see `target_prefix_ids`."""
        return target_prefix_ids(task.target_prefix, self.tokenizer, self.family)

    def label_set(self, task: TaskConfig, labels: Sequence[str]) -> LabelSet:
        """The label strings as answers spell them, with the ids of the target texts.

        Raises:
            ConfigError: see `check_labels` and `target_prefix_ids`.
        """
        prefix_ids = self.prefix_ids(task)
        tokens = tokenise(
            [Example(label, label) for label in self.spelt(task, labels)],
            self.tokenizer,
            family=self.family,
            max_input_tokens=self.config.backbone.max_input_tokens,
            append_eos=task.append_eos,
        ).examples
        texts = tuple(label.strip() for label in labels)
        bare = LabelSet(texts, tuple(example.target_ids for example in tokens))
        check_labels(bare, self.config.evaluation, self.tokenizer)
        return LabelSet(texts, tuple((*prefix_ids, *ids) for ids in bare.ids))


def check_method(evaluation: EvaluationConfig, task: TaskConfig, labels: Sequence[str]) -> None:
    """Refuse a way of finding answers that a task has no use for.

    Raises:
        ConfigError: rank without a label set, or greedy without an end of answers.
    """
    if evaluation.method == "rank" and not labels:
        raise ConfigError(
            f"evaluation.method is 'rank', which chooses among labels, but answers of task "
            f"{task.name!r} are free text. Set evaluation.method=greedy."
        )
    if evaluation.method == "greedy" and not task.append_eos:
        raise ConfigError(
            f"evaluation.method is 'greedy' and append_eos of task {task.name!r} is false, so no "
            "answer would ever end. Set evaluation.method=rank or append_eos: true."
        )
