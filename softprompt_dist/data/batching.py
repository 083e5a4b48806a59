"""Text pairs to token ids, and token ids to padded batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from softprompt_dist.data.encoding import encode_texts
from softprompt_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_dist.data.examples import Example

Family = Literal["seq2seq", "causal"]
IGNORED_LABEL = -100


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of the vocabulary: two tokenizers with the same pieces and ids share it."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


@dataclass(frozen=True)
class TokenExample:
    """Token ids of one input and its target, without padding."""

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True)
class Tokenised:
    """Examples as ids, and how many inputs were longer than the limit and cut."""

    examples: tuple[TokenExample, ...]
    num_truncated: int


class NoTokenError(DataError):
    """Some texts have no token in the vocabulary, as one of a zero-width space alone."""

    def __init__(self, positions: Sequence[int], text: str) -> None:
        """Of the examples at `positions`, input or target; `text` is the first."""
        super().__init__(f"Text {text!r} has no token in this model's vocabulary; remove the row.")
        self.positions = tuple(positions)


@dataclass(frozen=True)
class TokenBatch:
    """B examples padded to S input and T target positions; int64, masks 1 at tokens, else 0.

    It stays on the host: ids are looked up where the embedding table lies, and what else depends on
    them is known without asking a device.
    """

    input_ids_BS: torch.Tensor
    input_mask_BS: torch.Tensor
    target_ids_BT: torch.Tensor
    target_mask_BT: torch.Tensor

    @property
    def labels_BT(self) -> torch.Tensor:  # noqa: N802
        """Target ids, -100 where padded."""
        return self.target_ids_BT.masked_fill(self.target_mask_BT == 0, IGNORED_LABEL)


def tokenise(  # noqa: PLR0913 - all that ids depend on
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: Family,
    max_input_tokens: int,
    append_eos: bool,
    target_prefix: str | None = None,
    input_start: tuple[int, ...] = (),
) -> Tokenised:
    """Ids of inputs and targets; inputs of more than `max_input_tokens` ids are cut and counted.

    No text is a special piece, whatever is spelt in it: see `softprompt_dist.data.encoding`.

    seq2seq: the input ends in the end-of-sequence piece, which counts, and loses its end when cut
    (as in T5). causal: it begins with `input_start` (see `bos_ids`), which counts, too, and what is
    behind that loses its beginning, since the target continues its end. `append_eos` adds the
    end-of-sequence piece to the target, and `target_prefix` is the piece in front of it.

    Raises:
        ConfigError: see `target_prefix_ids`.
        DataError: the tokenizer has no end-of-sequence piece and one is needed.
        NoTokenError: a text has no token at all.
    """
    if not examples:
        return Tokenised((), 0)
    target_start = target_prefix_ids(target_prefix, tokenizer, family)
    target_end = end_of_sequence(tokenizer) if append_eos else ()
    rows, targets = _encode(
        tokenizer, [e.input_text for e in examples], [e.target_text for e in examples]
    )
    inputs = _inputs(rows, tokenizer, family, max_input_tokens, input_start)
    return Tokenised(
        tuple(
            TokenExample(example.input_ids, (*target_start, *target, *target_end))
            for example, target in zip(inputs.examples, targets, strict=True)
        ),
        inputs.num_truncated,
    )


def tokenise_inputs(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: Family,
    max_input_tokens: int,
    input_start: tuple[int, ...] = (),
) -> Tokenised:
    """As `tokenise`, of inputs to which nobody knows a target.

    Raises:
        DataError: see `tokenise`.
    """
    if not texts:
        return Tokenised((), 0)
    (rows,) = _encode(tokenizer, texts)
    return _inputs(rows, tokenizer, family, max_input_tokens, input_start)


def _inputs(
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    max_input_tokens: int,
    start: tuple[int, ...],
) -> Tokenised:
    end = end_of_sequence(tokenizer) if family == "seq2seq" else ()
    room = max_input_tokens - len(start) - len(end)
    return Tokenised(
        tuple(TokenExample((*start, *_cut(ids, room, family), *end), ()) for ids in rows),
        num_truncated=sum(len(ids) > room for ids in rows),
    )


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The id of the piece that ends a text.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The backbone's tokenizer has no end-of-sequence piece (eos_token), which seq2seq "
            "inputs and task.append_eos need. Set task.append_eos=false, or add eos_token to the "
            "tokenizer's config."
        )
    return (tokenizer.eos_token_id,)


def bos_ids(
    tokenizer: PreTrainedTokenizerBase, family: Family, wanted: bool | None
) -> tuple[int, ...]:
    """What stands before every input: the begin-of-sequence piece, or nothing.

    None, which is the default, means what the tokenizer itself does, as the model was trained.

    Raises:
        ConfigError: it is wanted, and the backbone is no decoder-only one or has no such piece.
    """
    bos = tokenizer.bos_token_id
    if wanted and (family == "seq2seq" or bos is None):
        why = "is an encoder-decoder" if family == "seq2seq" else "has no such piece (bos_token)"
        raise ConfigError(
            f"backbone.prepend_bos is true, but this backbone {why}. Leave prepend_bos out."
        )
    if wanted is None:
        wanted = family == "causal" and bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return (bos,) if wanted else ()


def target_prefix_ids(
    piece: str | None, tokenizer: PreTrainedTokenizerBase, family: Family
) -> tuple[int, ...]:
    """What stands before the ids of every target: the id of a task's `target_prefix`, or nothing.

    It is put before ids and not before text, as `add_sentinel_to_targets` of
    google-research/prompt-tuning does, so that what follows it is tokenised as if it began the
    target: `<extra_id_0>` before `positive` is (32099, 1465) for T5, whatever white space a
    tokenizer would make of text that follows a special piece.

    Raises:
        ConfigError: the backbone is decoder-only, or the tokenizer has no such special piece.
    """
    if piece is None:
        return ()
    if family == "causal":
        raise ConfigError(
            f"task.target_prefix is {piece!r}, with which T5s trained by span corruption begin "
            "what they write, but this backbone is decoder-only. Leave target_prefix out."
        )
    # An answer ends with the first of these, and would show no sign of the others.
    taken = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    known = [special for special in tokenizer.all_special_tokens if special not in taken]
    if piece not in known:
        remedy = f"Set it to one such as {known[0]}" if known else "It has none to use"
        raise ConfigError(
            f"task.target_prefix is {piece!r}, but must be one special piece of the backbone's "
            f"tokenizer, and not one that ends, pads or stands for the unknown. {remedy}, or leave "
            "it out."
        )
    return (int(tokenizer.convert_tokens_to_ids(piece)),)


def collate(examples: Sequence[TokenExample], *, pad_id: int, family: Family) -> TokenBatch:
    """Pad to the longest: targets on the right, inputs on the right (seq2seq) or left (causal).

    Left padding makes a causal model's target follow its input directly in every row.
    """
    inputs = [example.input_ids for example in examples]
    targets = [example.target_ids for example in examples]
    input_ids_BS, input_mask_BS = _pad(inputs, pad_id, left=family == "causal")
    target_ids_BT, target_mask_BT = _pad(targets, pad_id, left=False)
    return TokenBatch(input_ids_BS, input_mask_BS, target_ids_BT, target_mask_BT)


def silent(batch: TokenBatch) -> TokenBatch:
    """The same rows, none of whose target tokens counts."""
    return dataclasses.replace(batch, target_mask_BT=torch.zeros_like(batch.target_mask_BT))


def _pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids_BL = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BL[index, place] = torch.tensor(row, dtype=torch.int64)
        mask_BL[index, place] = 1
    return ids_BL, mask_BL


def _cut(ids: Sequence[int], room: int, family: Family) -> Sequence[int]:
    return ids[:room] if family == "seq2seq" else ids[max(0, len(ids) - room) :]


def _encode(tokenizer: PreTrainedTokenizerBase, *columns: Sequence[str]) -> list[list[list[int]]]:
    encoded = [encode_texts(column, tokenizer) for column in columns]
    empty = sorted(
        (position, text)
        for column, rows in zip(columns, encoded, strict=True)
        for position, (text, ids) in enumerate(zip(column, rows, strict=True))
        if not ids
    )
    if empty:
        raise NoTokenError([position for position, _ in empty], empty[0][1])
    return encoded
