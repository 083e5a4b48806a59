"""Label sets of which a label could never be an answer."""

from __future__ import annotations

from itertools import combinations, permutations

from transformers import PreTrainedTokenizerBase

from softprompt_dist.config import EvaluationConfig
from softprompt_dist.data.detokenise import detokenise
from softprompt_dist.errors import ConfigError
from softprompt_dist.run.scoring import LabelSet


def check_labels(
    labels: LabelSet, evaluation: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse labels that this tokenizer, or this way of finding answers, cannot tell apart.

    Raises:
        ConfigError: two labels are one, a label cannot be written, or one hides behind another.
    """
    _check_all_differ(labels)
    if evaluation.method == "greedy":
        _check_can_be_written(labels, tokenizer)
        _check_fits(labels, evaluation.max_target_tokens, tokenizer)
    elif evaluation.length_normalisation == "none":
        _check_none_hides(labels)


def _check_all_differ(labels: LabelSet) -> None:
    for (text, ids), (other, other_ids) in combinations(_pairs(labels), 2):
        if text == other or ids == other_ids:
            raise ConfigError(
                f"The labels {text!r} and {other!r} are the same to this backbone: white space at "
                f"the ends does not count, and its tokenizer makes {list(ids)} and "
                f"{list(other_ids)} of them. Give each another text in task.labels."
            )


def _check_can_be_written(labels: LabelSet, tokenizer: PreTrainedTokenizerBase) -> None:
    for (text, _), written in zip(_pairs(labels), detokenise(labels.ids, tokenizer), strict=True):
        if written.strip() != text:
            raise ConfigError(
                f"The label {text!r} cannot be generated: this backbone's tokenizer makes "
                f"{written.strip()!r} of it. Choose a text of pieces that it has, or set "
                "evaluation.method=rank."
            )


def _check_fits(
    labels: LabelSet, max_target_tokens: int | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    for text, ids in _pairs(labels):
        length = len(ids) - (ids[-1] == tokenizer.eos_token_id)
        if max_target_tokens is not None and length > max_target_tokens:
            raise ConfigError(
                f"evaluation.max_target_tokens is {max_target_tokens}, but the label {text!r} has "
                f"{length} tokens, so it would never be an answer. Raise it, or leave it out."
            )


def _check_none_hides(labels: LabelSet) -> None:
    for (text, ids), (longer, longer_ids) in permutations(_pairs(labels), 2):
        if longer_ids[: len(ids)] == ids:
            raise ConfigError(
                f"The label {longer!r} begins with {text!r}, which is therefore always the more "
                "likely one. Set task.append_eos=true, so that the end of a label counts, or an "
                "evaluation.length_normalisation."
            )


def _pairs(labels: LabelSet) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(labels.texts, labels.ids, strict=True))
