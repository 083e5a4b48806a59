"""Rows of decoder-only backbones are what their tokenizer makes of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.batching import Family
from softprompt_dist.data.tasks import load_task
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import check_values
from softprompt_dist.run.loaded_task import LoadedTask, TextReader
from softprompt_dist.run.prediction import _encoder
from tests import runs

pytestmark = pytest.mark.usefixtures("lone_process")
TEXTS = [row["text"] for row in runs.make_rows(60, seed=1)]


def byte_level(adds_bos: bool) -> PreTrainedTokenizerBase:
    """As Llama 3's and GPT-2's: a space belongs to the word behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    words = [*TEXTS, *(f"{text} {word}" for text in TEXTS for word in runs.ANSWERS.values())]
    backend.train_from_iterator(words, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def metaspace() -> PreTrainedTokenizerBase:
    """As Llama 2's: every text begins with a space."""
    tokenizer = byte_level(adds_bos=True)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    vocabulary = {"<bos>": 0, "<eos>": 1, "<unk>": 2}
    known = {word for text in TEXTS for word in text.split()}.union(runs.ANSWERS.values())
    for word in sorted(known):
        vocabulary[f"\u2581{word}"] = len(vocabulary)
    backend.model = models.WordLevel(vocabulary, unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    return tokenizer


def loaded(
    tokenizer: PreTrainedTokenizerBase, folder: Path, *overrides: str, family: Family = "causal"
) -> tuple[TextReader, LoadedTask]:
    data = runs.write_splits(folder)
    values: dict[str, Any] = {"task": runs.task("foods", data, runs.ANSWERS, append_eos=False)}
    values["evaluation"] = {"method": "rank"}
    config = check_values(TuneConfig, values, overrides)
    reader = TextReader(config, tokenizer, family)
    return reader, reader.load(config.task, load_task(config.task), ["train"])


@pytest.mark.parametrize("tokenizer", [byte_level(True), byte_level(False), metaspace()])
def test_input_and_target_are_what_the_tokenizer_makes_of_both_together(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    reader, task = loaded(tokenizer, tmp_path)
    split = task.splits["train"]
    for text, row in zip(split.texts, split.tokens, strict=True):
        whole = tokenizer(f"{text.input_text} {text.target_text}").input_ids
        assert [*row.input_ids, *row.target_ids] == whole
    labels = task.rule.labels
    assert {row.target_ids for row in split.tokens} == set(labels.ids)
    assert labels.texts == tuple(runs.ANSWERS.values())
    texts = [text.input_text for text in split.texts]
    assert _encoder(reader)(texts).examples[0].input_ids == split.tokens[0].input_ids


def test_a_recipe_may_say_otherwise(tmp_path: Path) -> None:
    tokenizer = byte_level(adds_bos=True)
    changes = ["backbone.prepend_bos=false", r'task.target_separator="\n"']
    _, task = loaded(tokenizer, tmp_path, *changes)
    text, row = task.splits["train"].texts[0], task.splits["train"].tokens[0]
    ids = tokenizer.backend_tokenizer.encode(text.input_text, add_special_tokens=False).ids
    assert list(row.input_ids) == ids
    assert tokenizer.decode(row.target_ids) == "\n" + text.target_text

    bare = byte_level(adds_bos=False)
    (wanted,) = loaded(bare, tmp_path, "backbone.prepend_bos=true")[1].splits["train"].tokens[:1]
    assert wanted.input_ids[0] == bare.bos_token_id
    spaced = ["task.input_template='{text} '", "task.labels.apple=' fruit'"]
    for override in spaced:
        _, task = loaded(bare, tmp_path, override)
        found = dict(zip(task.labels, task.rule.labels.ids, strict=True))
        assert bare.decode(found["fruit"]) == ("fruit" if "template" in override else " fruit")


def test_the_begin_of_sequence_piece_stays_when_an_input_is_cut(tmp_path: Path) -> None:
    tokenizer = byte_level(adds_bos=True)
    whole = loaded(tokenizer, tmp_path)[1].splits["train"]
    for limit in (1, 3):
        _, task = loaded(tokenizer, tmp_path, f"backbone.max_input_tokens={limit}")
        for row, long in zip(task.splits["train"].tokens, whole.tokens, strict=True):
            assert row.input_ids == (0, *long.input_ids[1:][-(limit - 1) :][: limit - 1])


def test_what_an_encoder_decoder_has_no_use_for_is_refused(tmp_path: Path) -> None:
    tokenizer = runs.train_tokenizer()
    for override in ("backbone.prepend_bos=true", "task.target_separator=x"):
        with pytest.raises(ConfigError, match=override.partition("=")[0]):
            loaded(tokenizer, tmp_path, override, family="seq2seq")
    with pytest.raises(ConfigError, match="has no such piece"):
        loaded(tokenizer, tmp_path, "backbone.prepend_bos=true")
