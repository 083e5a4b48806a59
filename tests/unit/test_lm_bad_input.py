"""Lengths, corpora and tokenizers that no row can be made of: value, rule, remedy."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.errors import ConfigError, DataError
from tests.lm_corpora import config_of, counting_corpus, data_of

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = counting_corpus([900] * 3)


def tokenizer_with(pad=None, eos=None, sentinels=()):
    vocabulary = {f"<extra_id_{k}>": token_id for k, token_id in enumerate(sentinels)}
    return SimpleNamespace(
        pad_token_id=pad, eos_token_id=eos, get_vocab=lambda: {"the": 5, **vocabulary}
    )


@pytest.mark.parametrize(
    ("tokenizer", "objective", "missing"),
    [
        (tokenizer_with(eos=1), "prefix_lm", "pad_token"),
        (tokenizer_with(pad=0), "prefix_lm", "eos_token"),
        (tokenizer_with(pad=0), "lm", "eos_token"),
        (tokenizer_with(pad=0, eos=1), "span_corruption", "<extra_id_0>"),
        (tokenizer_with(), "span_corruption", "eos_token and no pad_token and no <extra_id_0>"),
    ],
)
def test_a_tokenizer_without_what_the_objective_needs(tokenizer, objective, missing):
    with pytest.raises(DataError, match=f"no {missing}, which objective {objective} needs. Set"):
        SpecialIds.of(tokenizer, objective)


@pytest.mark.parametrize(
    ("tokenizer", "objective", "expected"),
    [
        (tokenizer_with(eos=7), "lm", SpecialIds(7, 7)),
        (tokenizer_with(pad=0, eos=1), "prefix_lm", SpecialIds(0, 1)),
        (tokenizer_with(0, 1, (99, 98, 97)), "span_corruption", SpecialIds(0, 1, 99, 3)),
        # Only those that count down from the first can be used.
        (tokenizer_with(0, 1, (99, 98, 50)), "span_corruption", SpecialIds(0, 1, 99, 2)),
        (tokenizer_with(0, 1, (99, 100, 101)), "span_corruption", SpecialIds(0, 1, 99, 1)),
    ],
)
def test_special_ids(tokenizer, objective, expected):
    assert SpecialIds.of(tokenizer, objective) == expected


@pytest.mark.parametrize("inputs_length", [8, 9])
def test_lengths_too_small_for_one_span(inputs_length):
    with pytest.raises(
        ConfigError,
        match=f"inputs_length {inputs_length} .*one whole span.*Set inputs_length to 10",
    ):
        data_of(CORPUS, objective="span_corruption", inputs_length=inputs_length)


@pytest.mark.parametrize(
    "noise", [{"noise_density": 0.9, "mean_noise_span_length": 1.0}, {"noise_density": 0.001}]
)
def test_noise_that_cannot_be_laid_out(noise):
    with pytest.raises(ConfigError, match="noise_density"):
        data_of(CORPUS, objective="span_corruption", inputs_length=64, **noise)


def test_targets_that_do_not_fit():
    with pytest.raises(ConfigError, match="targets of 114 tokens.*is 113. Set targets_length to"):
        data_of(CORPUS, objective="span_corruption", targets_length=113)


@pytest.mark.parametrize("special", [SpecialIds(0, 1), SpecialIds(0, 1, 99, 27)])
def test_too_few_sentinels(special):
    with pytest.raises(DataError, match="28 spans, but the tokenizer has .* sentinels.*Lower"):
        LMData(CORPUS, special, config_of(objective="span_corruption"))


def test_just_enough_sentinels():
    corpus = counting_corpus([900] * 3, first_id=100)
    data = LMData(corpus, SpecialIds(0, 1, 99, 28), config_of(objective="span_corruption"))
    assert data.num_examples == 2700 // 568
    batch = data.rows(data.plan(0, 4), 0, 4)
    for labels in batch.labels_BT.tolist():
        assert [token for token in labels if 1 < token < 100] == list(range(99, 71, -1))


def test_pairs_of_unequal_lengths():
    with pytest.raises(ConfigError, match="is 512 and targets_length 256.*Set both to 512, or"):
        data_of(CORPUS, packing="complementary_pairs", targets_length=256)


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"objective": "lm"}, [510]),
        ({"packing": "complementary_pairs"}, [200, 300]),
        ({"objective": "span_corruption"}, [567]),
        ({"packing": "greedy"}, []),
        ({"packing": "none"}, [0, 0]),
    ],
    ids=str,
)
def test_a_corpus_too_small_for_one_example(settings, lengths):
    total = sum(lengths)
    with pytest.raises(DataError, match=f"has {total} tokens in {len(lengths)} doc.*Give more"):
        data_of(counting_corpus(lengths), **settings)


@pytest.mark.parametrize(
    ("settings", "num_rows"),
    [
        ({"packing": "none"}, 30),
        ({"packing": "complementary_pairs"}, 15),
        ({"objective": "lm", "targets_length": 31}, 34),
        ({"objective": "span_corruption", "inputs_length": 64}, 15),
    ],
    ids=str,
)
def test_a_corpus_that_just_fills_a_batch(settings, num_rows):
    lengths = {"inputs_length": 36, "targets_length": 36}
    data = data_of(counting_corpus([35] * 30), **{**lengths, **settings})
    data.require_rows(num_rows)
    with pytest.raises(DataError, match=f"fewer than the {num_rows + 1} rows of one batch need"):
        data.require_rows(num_rows + 1)


def test_greedy_rows_need_text_too():
    data = data_of(counting_corpus([10] * 30), inputs_length=64, targets_length=64)
    data.require_rows(3)
    with pytest.raises(DataError, match="30 examples: fewer than the 20 rows"):
        data.require_rows(20)


def test_validation_text_too_short_for_a_row():
    data = data_of(
        counting_corpus([20]), packing="complementary_pairs", inputs_length=16, targets_length=16
    )
    with pytest.raises(DataError, match="1 examples: too few for one row"):
        data.validation_plan(100)


def test_special_ids_of_the_demo_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "softprompt_dist/assets/tiny-t5")
    special = SpecialIds.of(tokenizer, "span_corruption")
    assert (special.pad, special.eos, special.num_sentinels) == (0, 1, 100)
    assert tokenizer.convert_ids_to_tokens(special.first_sentinel) == "<extra_id_0>"
