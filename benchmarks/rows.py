"""Rows of the lengths that real tasks have: short review snippets and passages of BoolQ's lengths.

The snippets are VADER's movie reviews. BoolQ's text may not be shipped; without a file of it, its
rows are snippets strung together to BoolQ's recorded lengths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from softprompt_dist.data.rows import read_file
from softprompt_dist.data.vader import vader_rows

LABELS = {"positive": "positive", "negative": "negative", "true": "true", "false": "false"}
TEMPLATE = "passage: {passage} question: {question}"

# Tokens of the 3,270 validation rows in `TEMPLATE` with T5's 32k vocabulary (mean 155.5, largest
# 1138, 0.5 % above 512): quantiles at (k + 0.5) / 64.
# fmt: off
BOOLQ_LENGTHS = (
    42, 51, 59, 64, 69, 72, 76, 79, 82, 85, 87, 90, 93, 96, 99, 102, 104, 106, 109, 112, 114, 116,
    118, 121, 124, 126, 129, 131, 133, 135, 137, 140, 142, 145, 147, 150, 152, 155, 157, 161, 164,
    167, 170, 173, 176, 181, 184, 188, 193, 196, 201, 206, 213, 220, 226, 231, 239, 247, 258, 271,
    288, 305, 341, 451,
)
# fmt: on

Row = dict[str, str]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write a jsonl file with the fields text and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def real_rows(
    count: int, tokenizer: PreTrainedTokenizerBase, boolq: Path | None = None, seed: int = 0
) -> list[Row]:
    """`count` different rows: half of them snippets, half of BoolQ's lengths, in random order."""
    chosen = random.Random(seed)
    snippets = _snippets(chosen)
    half = [next(snippets) for _ in range(count // 2)]
    num_long = count - len(half)
    if boolq is not None:
        long = _boolq_rows(boolq, num_long, chosen)
    else:
        lengths = [
            BOOLQ_LENGTHS[int((k + 0.5) * len(BOOLQ_LENGTHS) / num_long)] for k in range(num_long)
        ]
        long = [_strung(snippets, length, tokenizer) for length in lengths]
    rows = half + long
    chosen.shuffle(rows)
    return rows


def fixed_rows(
    count: int, num_tokens: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> list[Row]:
    """`count` rows of at least `num_tokens` tokens, to be cut to just as many."""
    snippets = _snippets(random.Random(seed))
    return [_strung(snippets, num_tokens + 8, tokenizer) for _ in range(count)]


def _snippets(chosen: random.Random) -> Iterator[Row]:
    rows = [{"text": str(row["text"]), "label": str(row["label"])} for row in vader_rows("movies")]
    chosen.shuffle(rows)
    return cycle(rows)


def _strung(snippets: Iterator[Row], num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Snippets one after another, cut after the word that reaches `num_tokens`."""
    words: list[str] = []
    left = num_tokens - 1  # the end-of-sequence piece counts
    for row in snippets:
        for word in row["text"].split():
            words.append(word)
            left -= len(tokenizer(word, add_special_tokens=False)["input_ids"])
            if left <= 0:
                return {"text": " ".join(words), "label": row["label"]}
    raise AssertionError("snippets never end")


def _boolq_rows(path: Path, count: int, chosen: random.Random) -> list[Row]:
    rows: list[dict[str, Any]] = read_file(path).rows
    picked = chosen.sample(rows, count)
    return [
        {"text": TEMPLATE.format(**row), "label": "true" if row.get("label") else "false"}
        for row in picked
    ]
