"""Small corpora of known tokens, and the settings to read them with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.token_source import TokensInMemory

PAD, EOS, FIRST_SENTINEL = 0, 1, 100_099
SPECIAL = SpecialIds(PAD, EOS, FIRST_SENTINEL, 100)


def corpus_of(documents: Sequence[Sequence[int]]) -> TokensInMemory:
    offsets = np.cumsum([0, *map(len, documents)])
    ids = np.concatenate([np.array(document, dtype=np.int64) for document in documents])
    return TokensInMemory(ids, offsets)


def counting_corpus(lengths: Sequence[int], first_id: int = 10) -> TokensInMemory:
    """No token occurs twice: 10, 11, 12, ..."""
    offsets = np.cumsum([0, *lengths])
    return TokensInMemory(np.arange(first_id, first_id + offsets[-1]), offsets)


def some_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


def config_of(**settings: object) -> AdaptConfig:
    return AdaptConfig.model_validate({"corpus": ["text"], **settings})


def data_of(corpus: TokensInMemory, **settings: object) -> LMData:
    ids = np.asarray(corpus.token_ids)
    assert not ((ids <= EOS) | (ids > FIRST_SENTINEL - SPECIAL.num_sentinels)).any()
    return LMData(corpus, SPECIAL, config_of(**settings))
