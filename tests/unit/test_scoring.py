"""Predictions depend on the prompt and the row, and on nothing else."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_dist.backbone.load import load_tokenizer
from softprompt_dist.data.batching import TokenExample
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.scoring import LabelSet, Scorer
from tests.models import plain_model
from tests.stage import Stage

FAMILIES = ["seq2seq", "causal"]


@pytest.fixture(scope="module")
def stages(lively_t5: Path, lively_llama: Path) -> dict[str, Stage]:
    return {"seq2seq": Stage(lively_t5), "causal": Stage(lively_llama)}


@cache
def plain(stage: Stage) -> Any:
    """The Hugging Face model of a stage's weights."""
    return plain_model(Path(stage.backbone.path))


def log_likelihood(stage: Stage, row: TokenExample, ids: Tensor) -> float:
    """Of one label after one row, by the Hugging Face model alone, without any padding."""
    model, prompt = plain(stage), stage.prompt
    embed = model.get_input_embeddings()
    start = torch.cat([prompt.weight, embed(torch.tensor(row.input_ids))])[None]
    if stage.backbone.family == "seq2seq":
        logits_TV = model(inputs_embeds=start, labels=ids[None]).logits[0]
    else:
        embeds = torch.cat([start, embed(ids)[None]], dim=1)
        logits_TV = model(inputs_embeds=embeds).logits[0, start.shape[1] - 1 : -1]
    return float(logits_TV.log_softmax(-1).gather(1, ids[:, None]).sum())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rank_takes_the_label_of_greatest_likelihood(stages: dict[str, Stage], family: str) -> None:
    stage = stages[family]
    expected = []
    for row in stage.rows:
        scores = [log_likelihood(stage, row, torch.tensor(ids)) for ids in stage.labels.ids]
        expected.append(stage.labels.texts[scores.index(max(scores))])
    assert len(set(expected)) > 1
    assert stage.scorer("rank", 8).predict(stage.prompt, stage.rows) == expected


@torch.no_grad()
def test_rank_with_labels_of_one_token_each(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    pieces = (20, 21, 22, 23, 24, 25)
    labels = LabelSet(tuple(map(str, pieces)), tuple((piece,) for piece in pieces))
    scorer = Scorer(stage.backbone, stage.tokenizer, labels, "rank", 8)
    expected = []
    for row in stage.rows:
        scores = [log_likelihood(stage, row, torch.tensor([piece])) for piece in pieces]
        expected.append(str(pieces[scores.index(max(scores))]))
    assert len(set(expected)) > 1
    assert scorer.predict(stage.prompt, stage.rows) == expected


def generated_ids(stage: Stage, row: TokenExample, eos_id: int = 1) -> list[int]:
    """New tokens of `generate`, which stops after `eos_id`."""
    model = plain(stage)
    embed = model.get_input_embeddings()
    embeds = torch.cat([stage.prompt.weight, embed(torch.tensor(row.input_ids))])[None]
    ids = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max(len(ids) for ids in stage.labels.ids),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos_id,
    )[0].tolist()
    return ids[1:] if stage.backbone.family == "seq2seq" else ids


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_hugging_face_generates(stages: dict[str, Stage], family: str) -> None:
    stage = stages[family]
    ids = [generated_ids(stage, row) for row in stage.rows]
    expected = [stage.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
    assert len(set(expected)) > 3
    assert stage.scorer("greedy", 8).predict(stage.prompt, stage.rows) == expected


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ends_each_row_at_its_own_end(stages: dict[str, Stage], family: str) -> None:
    stage = stages[family]
    pieces = Counter(i for row in stage.rows for i in generated_ids(stage, row) if 2 < i < 200)
    eos_id = pieces.most_common(1)[0][0]
    tokenizer = load_tokenizer(Path(stage.backbone.path))
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(eos_id)})
    assert tokenizer.eos_token_id == eos_id
    ids = [generated_ids(stage, row, eos_id) for row in stage.rows]
    assert len({row.index(eos_id) if eos_id in row else -1 for row in ids}) > 1
    expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
    scorer = Scorer(stage.backbone, tokenizer, stage.labels, "greedy", 8)
    assert scorer.predict(stage.prompt, stage.rows) == expected


@pytest.mark.parametrize("method", ["rank", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batch_size_nor_order_matters(
    stages: dict[str, Stage], family: str, method: str
) -> None:
    stage = stages[family]
    reference = stage.scorer(method, 1).predict(stage.prompt, stage.rows)
    assert len(reference) == len(stage.rows)
    for batch_size in (4, 22, 23, 64):
        assert stage.scorer(method, batch_size).predict(stage.prompt, stage.rows) == reference
    order = random.Random(0).sample(range(len(stage.rows)), len(stage.rows))
    shuffled = stage.scorer(method, 5).predict(stage.prompt, [stage.rows[i] for i in order])
    assert shuffled == [reference[i] for i in order]


def test_the_prompt_matters(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    other = SoftPrompt(-3 * stage.prompt.weight.detach())
    scorer = stage.scorer("rank", 8)
    assert scorer.predict(other, stage.rows) != scorer.predict(stage.prompt, stage.rows)


def test_scoring_leaves_mode_gradient_and_random_state_alone(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    stage.backbone.train()
    before = torch.get_rng_state()
    stage.scorer("greedy", 8).predict(stage.prompt, stage.rows)
    assert stage.backbone.training
    assert stage.prompt.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    stage.backbone.eval()


def test_no_rows_no_predictions(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    assert stage.scorer("rank", 8).predict(stage.prompt, []) == []
