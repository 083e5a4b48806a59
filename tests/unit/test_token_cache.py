"""Tokens of a split are made once; whatever happens to the file, a run gets the right ones."""

import logging
import os
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from softprompt_dist.data import token_cache
from softprompt_dist.data.batching import TokenExample, tokenise
from softprompt_dist.data.examples import Example
from softprompt_dist.data.token_cache import tokens_of
from softprompt_dist.data.token_table import TokenTable

ASSETS = Path(token_cache.__file__).parents[1] / "assets" / "tiny-t5"
EXAMPLES = [Example(f"a film of {n} words" + " and more" * (n % 7), "positive") for n in range(30)]
SETTINGS = {"family": "seq2seq", "max_input_tokens": 16, "append_eos": True}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(ASSETS))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "FEWEST_ROWS_KEPT", 10)
    monkeypatch.setattr(token_cache, "_ROWS_AT_A_TIME", 7)
    token_cache._warn_once.cache_clear()
    return tmp_path / "tokens"


@pytest.fixture
def tokenised(monkeypatch):
    """How many examples `tokenise` was given, call by call."""
    calls = []

    def counted(examples, *rest, **settings):
        calls.append(len(examples))
        return tokenise(examples, *rest, **settings)

    monkeypatch.setattr(token_cache, "tokenise", counted)
    return calls


def entries(folder):
    return sorted(folder.glob("*.arrow"))


def test_a_table_holds_what_tokenise_makes(tokenizer):
    expected = tokenise(EXAMPLES, tokenizer, **SETTINGS)
    assert 0 < expected.num_truncated < len(EXAMPLES)
    for _ in ("made", "found"):
        table = tokens_of(EXAMPLES, tokenizer, **SETTINGS)
        assert tuple(table) == table[:] == expected.examples
        assert table.num_truncated == expected.num_truncated
        assert table.input_lengths.tolist() == [len(e.input_ids) for e in expected.examples]
        assert table.target_lengths.tolist() == [len(e.target_ids) for e in expected.examples]


def test_the_second_run_tokenises_nothing(tokenizer, tokenised):
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    assert sum(tokenised) == len(EXAMPLES)
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    assert sum(tokenised) == len(EXAMPLES)


def test_a_found_table_lies_in_the_file_and_outlives_it(tokenizer, folder):
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    table = tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    assert not table.inputs.ids.flags.owndata
    entries(folder)[0].unlink()
    assert table[:] == tokenise(EXAMPLES, tokenizer, **SETTINGS).examples


def test_an_entry_is_a_stream_that_arrow_s_own_tools_read(tokenizer, folder):
    import pyarrow as pa

    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    rows = pa.ipc.open_stream(entries(folder)[0].read_bytes()).read_all().to_pylist()
    made = tokenise(EXAMPLES, tokenizer, **SETTINGS).examples
    assert [row["input_ids"] for row in rows] == [list(e.input_ids) for e in made]
    assert [row["target_ids"] for row in rows] == [list(e.target_ids) for e in made]


@pytest.mark.parametrize(
    "change", [{"family": "causal"}, {"max_input_tokens": 17}, {"append_eos": False}]
)
def test_every_setting_has_an_entry_of_its_own(tokenizer, folder, change):
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    table = tokens_of(EXAMPLES, tokenizer, **{**SETTINGS, **change})
    assert table[:] == tokenise(EXAMPLES, tokenizer, **{**SETTINGS, **change}).examples
    assert len(entries(folder)) == 2


def test_other_texts_have_an_entry_of_their_own(tokenizer, folder):
    moved = [Example(EXAMPLES[0].input_text + "p", "ositive"), *EXAMPLES[1:]]
    for examples in (EXAMPLES, moved, EXAMPLES[:-1]):
        tokens_of(examples, tokenizer, **SETTINGS)
    assert len(entries(folder)) == 3


def test_a_tokenizer_that_reads_the_same_vocabulary_otherwise_has_its_own_entry(tokenizer, folder):
    from tokenizers import normalizers

    other = AutoTokenizer.from_pretrained(str(ASSETS))
    other.backend_tokenizer.normalizer = normalizers.Replace("film", "movie")
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    table = tokens_of(EXAMPLES, other, **SETTINGS)
    assert table[:] == tokenise(EXAMPLES, other, **SETTINGS).examples
    assert len(entries(folder)) == 2


def test_padding_elsewhere_does_not_make_it_another_tokenizer(tokenizer, folder):
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    tokenizer(["a", "a film"], padding=True)
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    assert len(entries(folder)) == 1


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "three bytes": lambda content: content[:3],
    "another file": lambda content: b"nothing" * 100,
    "another schema": lambda content: flipped(content, 40),
    "another number": lambda content: flipped(content, len(content) // 2),
    "another checksum": lambda content: flipped(content, len(content) - 1),
}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_anew(tokenizer, folder, tokenised, caplog, damage):
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    (path,) = entries(folder)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        table = tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    assert table[:] == tokenise(EXAMPLES, tokenizer, **SETTINGS).examples
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole
    assert sum(tokenised) == 2 * len(EXAMPLES)


def test_a_folder_that_cannot_be_written_breaks_nothing_and_is_told_once(
    tokenizer, folder, tokenised, caplog
):
    folder.write_text("a file where the folder should be", encoding="utf-8")
    expected = tokenise(EXAMPLES, tokenizer, **SETTINGS).examples
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert tokens_of(EXAMPLES, tokenizer, **SETTINGS)[:] == expected
    assert caplog.text.count("SOFTPROMPT_CACHE") == 1
    assert sum(tokenised) == 2 * len(EXAMPLES)


def test_a_full_disk_costs_the_file_and_not_the_tokens(tokenizer, folder, monkeypatch, caplog):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "replace_file", full)
    table = tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    assert table[:] == tokenise(EXAMPLES, tokenizer, **SETTINGS).examples
    assert "No space left" in caplog.text
    assert entries(folder) == []


def test_few_examples_are_not_kept(tokenizer, folder):
    assert len(tokens_of(EXAMPLES[:9], tokenizer, **SETTINGS)) == 9
    assert len(tokens_of([], tokenizer, **SETTINGS)) == 0
    assert not folder.exists()


def test_runs_that_start_together_tokenise_once(tokenizer, tokenised):
    with ThreadPool(4) as pool:
        tables = pool.map(lambda _: tokens_of(EXAMPLES, tokenizer, **SETTINGS), range(4))
    assert sum(tokenised) == len(EXAMPLES)
    assert len({table[:] for table in tables}) == 1


def test_entries_that_nobody_opened_for_a_month_go_when_another_is_written(tokenizer, folder):
    long_ago = time.time() - 40 * 86400
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)
    tokens_of(EXAMPLES[1:], tokenizer, **SETTINGS)
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    tokens_of(EXAMPLES, tokenizer, **SETTINGS)  # opened, and so kept
    tokens_of(EXAMPLES[2:], tokenizer, **SETTINGS)
    assert len(entries(folder)) == 2


def test_examples_without_a_token_are_left_out_and_told_of(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(token_cache, "_ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(token_cache, "FEWEST_ROWS_KEPT", 1)
    good = EXAMPLES[0]
    examples = [Example("", "positive"), good, good, Example("a", ""), good, Example("", "")]
    for _ in ("made", "found"):
        table = tokens_of(examples, tokenizer, **SETTINGS)
        assert table.left_out == (0, 3, 5)
        assert list(table) == list(tokenise([good] * 3, tokenizer, **SETTINGS).examples)
    assert len(entries(folder)) == 1


def test_a_table_is_a_sequence():
    rows = [TokenExample((1, 2, 3), (4,)), TokenExample((5,), (6, 7)), TokenExample((8, 9), (1,))]
    table = TokenTable.of(rows, num_truncated=2)
    assert (len(table), table[-1], list(table), table[1:]) == (3, rows[2], rows, tuple(rows[1:]))
    assert all(isinstance(i, int) for i in table[0].input_ids)
    assert table[np.int64(1)] == rows[1]
    with pytest.raises(IndexError):
        table[3]
