"""The words of a recipe that stand in texts beside those of the rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softprompt_dist.data.batching import Family
from softprompt_dist.data.encoding import encode_texts
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_dist.task_config import TaskConfig

log = logging.getLogger(__name__)


def spelt_targets(
    targets: Sequence[str], task: TaskConfig, tokenizer: PreTrainedTokenizerBase, family: Family
) -> Sequence[str]:
    """Targets as they follow an input: behind the task's separator.

    Raises:
        ConfigError: the task has one, and the backbone is an encoder-decoder.
    """
    separator = task.target_separator
    if family == "seq2seq":
        if separator is not None:
            raise ConfigError(
                f"task.target_separator is {separator!r}, but the targets of an encoder-decoder "
                "follow no input. Leave it out."
            )
        return targets
    if separator is None:
        is_spaced = (task.input_template or "")[-1:].isspace()
        separator = "" if is_spaced else usual_separator(tokenizer)
    return [text if text[:1].isspace() else separator + text for text in targets]


def usual_separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes a text on its own the pieces that it has behind a word and a space.

    A space for tokenizers that give it to the word behind it, as GPT-2's; nothing for those that
    begin every text with one, as sentencepiece's.
    """
    first, alone, spaced, both = encode_texts(["a", "b", " b", "a b"], tokenizer)
    return " " if spaced != alone and both == [*first, *spaced] else ""


def tell_of_special_pieces(
    task: TaskConfig, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Warn of those that the template or a label spells out: they are text as any other."""
    texts = (task.input_template or "", *labels)
    spelt = [p for p in tokenizer.all_special_tokens if any(p in text for text in texts)]
    if spelt and ranks.is_main():
        log.warning(
            "%s in the template or a label of %s is text as any other, not the special piece "
            "of the tokenizer; task.target_prefix is the way to ask for one.",
            ", ".join(map(repr, spelt)),
            task.name,
        )
