"""Answers of a prompt to the rows of a file of any length, in a world that was joined already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.load import family_of, load_tokenizer, locate_backbone
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.batching import (
    Tokenised,
    end_of_sequence,
    tokenise_inputs,
)
from softprompt_dist.data.reading import TaskReader
from softprompt_dist.data.tasks import task_reader
from softprompt_dist.errors import ConfigError
from softprompt_dist.lifecycle.watchdog import doing
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.file import load_prompt
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.evaluation import (
    accept_of,
    prompt_for,
    warn_of_other_family,
    warn_of_other_prefix,
)
from softprompt_dist.run.loaded_task import TextReader, check_method
from softprompt_dist.run.prediction_desk import PredictionDesk, PredictionRequest
from softprompt_dist.run.prediction_rows import Encode
from softprompt_dist.run.scoring import AnswerRule
from softprompt_dist.run.tuning import build_bench

DEFAULT_TARGET_TOKENS = 64
"""Of free text, whose longest target nobody knows."""


def predict(
    config: TuneConfig, request: PredictionRequest, ds_config: dict[str, Any] | None = None
) -> None:
    """All ranks: answer every row of a file; continues what a killed run has left.

    Raises:
        PromptFileError: the file is unreadable, or belongs to another backbone and not `force`.
        DataError: rows, input or output cannot be used, or the output belongs to something else.
        SoftpromptError: see `build_bench`.
    """
    _, metadata = ranks.together(lambda: load_prompt(request.prompt_file))
    reader = ranks.together(lambda: _checked_reader(config))
    if ranks.is_main():
        warn_of_other_family(metadata, config.task.name, reader.family)
        warn_of_other_prefix(metadata, config.task)
    desk = PredictionDesk(config, request, reader)
    try:
        if not ranks.on_main(desk.open):
            _answer_all(config, request, ds_config, reader, desk)
    finally:
        desk.output.close()


def _answer_all(
    config: TuneConfig,
    request: PredictionRequest,
    ds_config: dict[str, Any] | None,
    reader: TaskReader,
    desk: PredictionDesk,
) -> None:
    folder = locate_backbone(config.backbone)
    tokenizer = ranks.together(lambda: load_tokenizer(folder))
    texts = TextReader(config, tokenizer, ranks.together(lambda: family_of(folder)))
    rule = ranks.together(lambda: _rule(texts, reader.labels))
    encode = _encoder(texts)
    blocks = ranks.on_main(lambda: desk.next_blocks(encode))  # bad rows are said before the load
    accept = accept_of(request.prompt_file, force=request.force)
    bench = build_bench(config, ds_config, splits=None, accept=accept)
    prompt_PD = ranks.together(lambda: prompt_for(bench, request.prompt_file))
    ranks.together(lambda: _check_positions(config, bench.backbone, len(prompt_PD), rule))
    prompt = SoftPrompt(prompt_PD).to(ranks.device())
    ranks.on_main(lambda: desk.begin(bench.identity))
    limit, first_limit = config.health.step_timeout_seconds, config.health.slow_timeout_seconds
    while blocks is not None:
        what = desk.doing if ranks.is_main() else ""
        with doing("predicting", limit, first_seconds=first_limit):
            predictions = bench.scorer.predict_blocks(prompt, blocks, rule, what)
        first_limit = limit
        ranks.on_main(partial(desk.write, predictions, rule.labels.texts))
        blocks = ranks.on_main(lambda: desk.next_blocks(encode))
    ranks.on_main(lambda: desk.finish(bench.scorer.batch_tokens))


def _checked_reader(config: TuneConfig) -> TaskReader:
    reader = task_reader(config.task)
    check_method(config.evaluation, config.task, reader.labels)
    return reader


def _rule(texts: TextReader, labels: Sequence[str]) -> AnswerRule:
    config = texts.config
    if config.task.append_eos:
        end_of_sequence(texts.tokenizer)
    known = texts.label_set(config.task, labels)
    free_text = DEFAULT_TARGET_TOKENS + len(texts.prefix_ids(config.task))
    longest = max(map(len, known.ids), default=free_text)
    return texts.answer_rule(config.task, known, texts.max_target_tokens(config.task, longest))


def _encoder(texts: TextReader) -> Encode:
    def encode(inputs: Sequence[str]) -> Tokenised:
        return tokenise_inputs(
            inputs,
            texts.tokenizer,
            family=texts.family,
            max_input_tokens=texts.config.backbone.max_input_tokens,
            input_start=texts.input_start,
        )

    return encode


def _check_positions(
    config: TuneConfig, backbone: Backbone, prompt_length: int, rule: AnswerRule
) -> None:
    """Refuse settings under which an input could be too long; nobody knows the rows to come."""
    needed = prompt_length + config.backbone.max_input_tokens + rule.answer_tokens
    limit = backbone.position_limit
    if limit is not None and needed > limit.positions:
        raise ConfigError(
            f"The prompt's {prompt_length} vectors, backbone.max_input_tokens "
            f"{config.backbone.max_input_tokens} and {rule.answer_tokens} tokens of answer make "
            f"{needed} positions, but {limit.reason}. Lower backbone.max_input_tokens by "
            f"{needed - limit.positions} or more."
        )
