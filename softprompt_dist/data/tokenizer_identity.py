"""What a tokenizer makes of text, as a few values that can be stored and compared."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from softprompt_dist.data.batching import tokenizer_fingerprint
from softprompt_dist.data.encoding import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "The quick brown fox can't jump over 1,234.50 lazy dogs -- or (perhaps) it did in 2026?",
    "  Leading, doubled  and trailing spaces, a\ttab and a line\nbreak.  ",
    "UPPER lower MiXeD camelCase snake_case x=y*z; a/b\\c <tag> [list] {set} a@b.org #1 50% $5",
    "Caf\u00e9 cafe\u0301 na\u00efve \u00dcber stra\u00dfe \u2018quoted\u2019",
    "\ufb01ne \uff21\u2026 \u041f\u0440\u0438\u0432\u0435\u0442 \u03b3\u03b5\u03b9\u03ac",
    "\u4f60\u597d \u3053\u3093 \U0001f600",
)
"""Texts on which ways to read one vocabulary differ: case, spaces, digits, Unicode's forms."""


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | int | None]:
    """What the ids of a text depend on, however the tokenizer is stored.

    The same tokenizer as spiece.model and as tokenizer.json has the same values. A vocabulary may
    be read in several ways, so the ids of a few texts are among them.

    Returns:
        pieces: how many; vocabulary: sha256 of pieces with ids; ids_of_probe: sha256 of the ids of
        fixed texts, without special pieces; bos_token_id, eos_token_id: None where there is none.
    """
    ids = encode_texts(_PROBE, tokenizer)
    return {
        "pieces": len(tokenizer),
        "vocabulary": tokenizer_fingerprint(tokenizer),
        "ids_of_probe": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
