import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import softprompt_dist
from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.data.corpus import (
    cut_concatenated,
    documents,
    parse_repeats,
    tokenise_corpus,
)
from softprompt_dist.data.denoising import DenoisingData, SpecialIds
from softprompt_dist.errors import DataError

TOKENIZER = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"
LINES = [f"Line {i} says that the river number {i * 7} was wide and cold." for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(LINES) + "\n")
    return path


def config(**changes):
    values = {
        "corpus": ["unused"],
        "objective": "span_corruption",
        "inputs_length": 32,
        "targets_length": 32,
        "seed": 5,
    }
    return AdaptConfig.model_validate(values | changes)


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_documents_are_the_lines_that_are_not_blank(tmp_path, suffix, opener):
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("first\n\n   \n second line \nlast")
    assert list(documents(path)) == ["first", "second line", "last"]


def test_a_damaged_or_missing_file_is_named(tmp_path):
    damaged = tmp_path / "damaged.gz"
    damaged.write_bytes(gzip.compress(b"text" * 1000)[:40])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    for path in (damaged, latin, tmp_path / "absent.txt"):
        with pytest.raises(DataError, match=path.name):
            list(documents(path))


def test_repeats_are_parsed():
    assert parse_repeats("a/b.txt*12") == (Path("a/b.txt"), 12)
    assert parse_repeats("a/b.txt") == (Path("a/b.txt"), 1)
    assert parse_repeats("a*0") == (Path("a*0"), 1)


def test_tokens_are_those_of_each_document_and_repeat(text, tokenizer, tmp_path):
    once = tokenise_corpus([str(text)], tokenizer, tmp_path / "cache")
    twice = tokenise_corpus([f"{text}*2"], tokenizer, tmp_path / "cache")
    for number, line in enumerate(LINES):
        ids = once.token_ids[once.offsets[number] : once.offsets[number + 1]]
        assert ids.tolist() == tokenizer(line, add_special_tokens=False).input_ids
    assert twice.token_ids.tolist() == once.token_ids.tolist() * 2
    assert len(twice.offsets) == 2 * len(LINES) + 1
    assert twice.fingerprint != once.fingerprint


def test_the_cache_is_used_until_the_text_changes(text, tokenizer, tmp_path):
    def forbidden(*args, **kwargs):
        raise AssertionError("tokenised again")

    first = tokenise_corpus([str(text)], tokenizer, tmp_path / "cache")
    blind = type(
        "Blind", (), {"__call__": forbidden, "get_vocab": lambda self: tokenizer.get_vocab()}
    )
    again = tokenise_corpus([str(text)], blind(), tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.token_ids.tolist() == first.token_ids.tolist()
    text.write_text("another text\n")
    changed = tokenise_corpus([str(text)], tokenizer, tmp_path / "cache")
    assert changed.fingerprint != first.fingerprint
    assert len(changed.offsets) == 2


def test_a_corpus_without_text_or_shorter_than_a_piece_is_refused(tmp_path, tokenizer):
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    with pytest.raises(DataError, match="no text"):
        tokenise_corpus([str(blank)], tokenizer, tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("two words\n")
    with pytest.raises(DataError, match="needs 100"):
        cut_concatenated(tokenise_corpus([str(short)], tokenizer, tmp_path), 100)


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_an_example_depends_on_its_position_alone(text, tokenizer, tmp_path, objective):
    corpus = tokenise_corpus([str(text)], tokenizer, tmp_path)
    recipe = config(objective=objective)
    data = DenoisingData(corpus, SpecialIds.of(tokenizer), recipe)
    whole = data.batch(0, 24)
    fresh = DenoisingData(corpus, SpecialIds.of(tokenizer), recipe)
    for world_size, micro in ((2, 4), (3, 2), (1, 1)):
        for start in range(0, 24, world_size * micro):
            for rank in reversed(range(world_size)):
                first = start + rank * micro
                part = fresh.batch(first, micro)
                rows = slice(first, first + micro)
                assert part.input_ids_BS.equal(whole.input_ids_BS[rows])
                assert part.target_ids_BT.equal(whole.target_ids_BT[rows])
    other_seed = DenoisingData(
        corpus, SpecialIds.of(tokenizer), config(objective=objective, seed=6)
    )
    assert not other_seed.batch(0, 24).input_ids_BS.equal(whole.input_ids_BS)


def test_span_corruption_needs_no_padding_and_hides_nothing(text, tokenizer, tmp_path):
    corpus = tokenise_corpus([str(text)], tokenizer, tmp_path)
    special = SpecialIds.of(tokenizer)
    data = DenoisingData(corpus, special, config())
    batch = data.batch(0, 8)
    assert batch.input_mask_BS.all()
    assert batch.input_ids_BS.shape == (8, 32)
    for example in data.examples(0, 8):
        merged, targets = [], example.target_ids.tolist()[:-1]
        for token in example.input_ids.tolist()[:-1]:
            if token <= special.first_sentinel - 100:
                merged.append(token)
                continue
            at = targets.index(token) + 1
            while at < len(targets) and targets[at] <= special.first_sentinel - 100:
                merged.append(targets[at])
                at += 1
        text_ids = corpus.token_ids.tolist()
        assert any(
            text_ids[s : s + len(merged)] == merged for s in range(len(text_ids) - len(merged) + 1)
        )


def test_every_piece_is_seen_once_an_epoch_and_masked_anew_in_the_next(text, tokenizer, tmp_path):
    corpus = tokenise_corpus([str(text)], tokenizer, tmp_path)
    data = DenoisingData(corpus, SpecialIds.of(tokenizer), config(objective="prefix_lm"))

    def joined(start):
        return [
            np.concatenate([e.input_ids[:-1], e.target_ids[:-1]]).tolist()
            for e in data.examples(start, len(data))
        ]

    assert sorted(joined(0)) == sorted(joined(len(data)))
    splits = [{len(e.input_ids) for e in data.examples(s, len(data))} for s in (0, len(data))]
    assert splits[0] != splits[1]


def test_targets_that_would_be_cut_are_refused(text, tokenizer, tmp_path):
    corpus = tokenise_corpus([str(text)], tokenizer, tmp_path)
    with pytest.raises(DataError, match="targets_length"):
        DenoisingData(corpus, SpecialIds.of(tokenizer), config(inputs_length=64, targets_length=8))
