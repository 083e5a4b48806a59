"""Rank 0 tokenises, the other finds it; where nothing can be kept, both do."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from softprompt_dist.data import token_cache
from softprompt_dist.data.batching import tokenise
from softprompt_dist.data.examples import Example

ASSETS = Path(token_cache.__file__).parents[1] / "assets" / "tiny-t5"
EXAMPLES = [Example(f"film {n}", "good") for n in range(token_cache.FEWEST_ROWS_KEPT)]
SETTINGS = {"family": "seq2seq", "max_input_tokens": 16, "append_eos": True}


def tokens_in(folder):
    os.environ["SOFTPROMPT_CACHE"] = folder
    tokenizer = AutoTokenizer.from_pretrained(str(ASSETS))
    num_tokenised = 0

    def counted(examples, *rest, **settings):
        nonlocal num_tokenised
        num_tokenised += len(examples)
        return tokenise(examples, *rest, **settings)

    token_cache.tokenise = counted
    table = token_cache.tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    right = table[:] == tokenise(EXAMPLES, tokenizer, **SETTINGS).examples
    short = token_cache.tokens_of([*EXAMPLES, Example("", "good")], tokenizer, **SETTINGS)
    return {"right": right, "made": num_tokenised, "left_out": short.left_out}


@pytest.mark.parametrize("can_be_kept", [True, False])
def test_rank_0_makes_what_the_other_finds(run_on_ranks, tmp_path, can_be_kept):
    if not can_be_kept:
        (tmp_path / "tokens").touch()
    first, second = run_on_ranks(tokens_in, 2, folder=str(tmp_path))
    for found in (first, second):
        assert found["right"]
        assert found["left_out"] == [len(EXAMPLES)]
    assert first["made"] > 2 * len(EXAMPLES)
    assert second["made"] == (0 if can_be_kept else first["made"])
