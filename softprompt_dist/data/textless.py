"""Rows whose text has no token: bad ones, which only the backbone's tokenizer can tell."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softprompt_dist.data.encoding import encode_texts
from softprompt_dist.data.examples import Example
from softprompt_dist.data.split_reading import NUM_SHOWN, refusal
from softprompt_dist.data.tasks import TaskData
from softprompt_dist.errors import DataError
from softprompt_dist.parallel import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_dist.task_config import TaskConfig

log = logging.getLogger(__name__)


def without_textless(
    data: TaskData,
    split: str,
    positions: Sequence[int],
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> TaskData:
    """The data without the rows of those examples of `split`, whose input or target has no token.

    Raises:
        DataError: bad rows may not be left out, or no other is there.
    """
    problems = {
        example.where: _problem(example, tokenizer)
        for example in (data.splits[split][position] for position in positions)
    }
    told = list(problems.values())
    if not config.skip_bad_rows:
        raise DataError(refusal(told, len(told)))
    found = data.without(split, problems)
    if not found.splits[split]:
        raise DataError(f"No row of split {split!r} of {data.name} can be used: {told[0]}")
    if ranks.is_main():
        message = "%d rows of split %s of %s cannot be used and are left out: %s"
        log.warning(message, len(told), split, data.name, " ".join(told[:NUM_SHOWN]))
    return found


def _problem(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    is_target = bool(encode_texts([example.input_text], tokenizer)[0])
    what, text = ("answer", example.target_text) if is_target else ("text", example.input_text)
    return (
        f"{example.where}: its {what} {text!r:.80} has no token in the vocabulary of the backbone. "
        f"Correct or remove it."
    )
