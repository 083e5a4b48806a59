"""A whole tuning run in small: backbones with their tokenizer, a learnable task, a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import SentencePieceUnigramTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from softprompt_dist.data.sources import SPLITS
from softprompt_dist.run.metrics_file import read_metrics
from tests.models import make_llama, make_t5, save_model

VOCABULARY = 256
"""Rows of the embedding table; more than the tokenizer has pieces, as in T5."""
ANSWERS = {"apple": "fruit", "carrot": "root", "salmon": "fish"}
"""Word in the text -> the target text. A target has several pieces."""
POISON = "☃"
"""A character that the tokenizer does not know."""
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9000\n"
SIDES = {"milk": "left", "stone": "right"}
"""Of another task: labels of their own, of which there are two."""
_FILLERS = ["the", "a", "we", "they", "saw", "ate", "near", "old", "green", "river", "today", "and"]
# Everything is partitioned: without this DeepSpeed leaves tensors this small whole on every rank.
PARTITION_EVERYTHING = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def make_rows(count: int, seed: int, words: Mapping[str, str] = ANSWERS) -> list[dict[str, str]]:
    """Short texts of 3 to 9 words; the label is the one of `words` (the foods) that occurs."""
    chosen = random.Random(seed)
    return [_row(chosen, chosen.choice(list(words))) for _ in range(count)]


def _row(chosen: random.Random, word: str) -> dict[str, str]:
    words = [chosen.choice(_FILLERS) for _ in range(chosen.randint(2, 8))]
    words.insert(chosen.randint(0, len(words)), word)
    return {"text": " ".join(words), "label": word}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_splits(folder: Path, words: Mapping[str, str] = ANSWERS) -> Path:
    """train.jsonl, validation.jsonl and test.jsonl in a folder."""
    for seed, (split, count) in enumerate({"train": 150, "validation": 21, "test": 21}.items()):
        write_rows(folder / f"{split}.jsonl", make_rows(count, seed, words))
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer as T5's: pad 0, end of sequence 1, unknown 2, then pieces with ▁."""
    trained = SentencePieceUnigramTokenizer()
    texts = [row["text"] for row in make_rows(200, seed=9)]
    trained.train_from_iterator(
        [*texts, *ANSWERS.values(), *_made_up_words(400)],
        vocab_size=VOCABULARY - 28,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _made_up_words(count: int) -> list[str]:
    chosen = random.Random(7)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    return ["".join(chosen.choices(syllables, k=chosen.randint(1, 3))) for _ in range(count)]


def save_t5(folder: Path, seed: int = 0, d_model: int = 32) -> Path:
    """A T5 v1.1 folder with weights and tokenizer."""
    train_tokenizer().save_pretrained(str(folder))
    return save_model(make_t5(VOCABULARY, seed, d_model), folder)


def save_llama(folder: Path, seed: int = 0) -> Path:
    """A Llama folder with weights and tokenizer."""
    train_tokenizer().save_pretrained(str(folder))
    return save_model(make_llama(VOCABULARY, seed), folder)


def tiny_recipe(backbone: Path, data: Path) -> dict[str, Any]:
    """Settings of a run of 40 steps of 8 rows; on two ranks an update is one micro-batch each."""
    return {
        "name": "tiny",
        "seed": 5,
        "steps": 40,
        "backbone": {"path": str(backbone), "sharding": "replicated", "max_input_tokens": 48},
        "task": task("foods", data, ANSWERS),
        "prompt": {"prompt_length": 5},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "evaluation": {"every_steps": 10, "method": "rank", "batch_tokens": 256},
        "checkpoint": {"every_steps": 10, "keep_last": 3},
    }


def task(
    name: str, data: Path, labels: Mapping[str, str], splits: Iterable[str] = SPLITS, **more: Any
) -> dict[str, Any]:
    """The section of a task whose splits are files in a folder."""
    files = {split: str(data / f"{split}.jsonl") for split in splits}
    return {"name": name, "source": {"kind": "files", **files}, "labels": dict(labels), **more}


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(dict(recipe)))
    return path


def metrics_without_time(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one kind or all, without what they cost.

    A resumed run gathers more in its first step: ZeRO-3 must learn the order of the blocks again.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if name not in ("time", "gathered_bytes")}
        for line in lines
        if kind in (None, line["kind"])
    ]


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Prompts and optimizer state of a checkpoint."""
    return load_file(checkpoint_folder(run_dir, step) / "state.safetensors")


def prompt_metadata(path: Path) -> dict[str, Any]:
    """What a prompt file says of itself."""
    with safe_open(path, framework="pt") as file:
        values: dict[str, Any] = json.loads(file.metadata()["softprompt"])
    return values
