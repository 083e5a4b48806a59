from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from tests import corpora


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The one of the demo, as most tests of text and its ids want it."""
    return corpora.tiny_t5()
