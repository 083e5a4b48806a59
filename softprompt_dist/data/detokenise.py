"""Token ids of answers to text, as seqio's SentencePieceVocabulary decodes what T5 wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = " ⁇ "
"""What SentencePiece writes for an unknown piece."""


def detokenise(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of each row up to its first end-of-sequence piece; padding is nothing.

    All else is text that counts when an answer is judged: a special piece such as `<extra_id_0>`
    stays, an unknown one or an id beyond the vocabulary is ` ⁇ `, and spaces stay where they are.
    transformers would leave out special pieces and, for T5, write `it ' s` as `it's`.
    """
    if not rows:
        return []  # transformers makes one text of no rows
    texts = tokenizer.batch_decode(
        [_cleaned(row, tokenizer) for row in rows],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    unknown = tokenizer.unk_token
    return [text.replace(unknown, UNKNOWN) if unknown else text for text in texts]


def _cleaned(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    written = [i for i in _before(ids, end) if i != tokenizer.pad_token_id]
    if tokenizer.unk_token_id is None:
        return [i for i in written if i < len(tokenizer)]
    return [i if i < len(tokenizer) else tokenizer.unk_token_id for i in written]


def _before(ids: Sequence[int], end: int | None) -> Sequence[int]:
    ids = list(ids)
    return ids[: ids.index(end)] if end in ids else ids
