"""Predictions depend on the prompt and the row, and on nothing else."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from softprompt_dist.backbone.load import load_tokenizer
from softprompt_dist.data.batching import TokenExample
from softprompt_dist.data.detokenise import detokenise
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.scoring import AnswerRule, LabelSet, Scorer, pad_id_of
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
    assert stage.predict(stage.rule("rank")) == expected


@torch.no_grad()
def test_rank_with_labels_of_one_token_each(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    pieces = (20, 21, 22, 23, 24, 25)
    labels = LabelSet(tuple(map(str, pieces)), tuple((piece,) for piece in pieces))
    expected = []
    for row in stage.rows:
        scores = [log_likelihood(stage, row, torch.tensor([piece])) for piece in pieces]
        expected.append(str(pieces[scores.index(max(scores))]))
    assert len(set(expected)) > 1
    assert stage.predict(AnswerRule("rank", labels, 1)) == expected


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
    expected = [text.strip() for text in detokenise(ids, stage.tokenizer)]
    assert len(set(expected)) > 3
    assert stage.predict(stage.rule("greedy")) == expected


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
    expected = [text.strip() for text in detokenise(ids, tokenizer)]
    found = Scorer(stage.backbone, tokenizer, 200).predict(
        stage.prompt, stage.rows, stage.rule("greedy")
    )
    assert [prediction.text for prediction in found] == expected


@pytest.mark.parametrize("method", ["rank", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batches_nor_order_matter(
    stages: dict[str, Stage], family: str, method: Literal["rank", "greedy"]
) -> None:
    stage = stages[family]
    rule = stage.rule(method)
    reference = stage.predict(rule, batch_tokens=1)
    assert len(reference) == len(stage.rows)
    for batch_tokens in (100, 500, 1000, 10000):
        assert stage.predict(rule, batch_tokens=batch_tokens) == reference
    order = random.Random(0).sample(range(len(stage.rows)), len(stage.rows))
    shuffled = stage.predict(rule, [stage.rows[i] for i in order])
    assert shuffled == [reference[i] for i in order]


@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_labels_are_ranked_within_the_budget_as_all_at_once(
    stages: dict[str, Stage], family: str, width: int
) -> None:
    stage, budget = stages[family], 64
    ids = [tuple(range(3 + i, 3 + i + 1 + i % width)) for i in range(100)]
    rule = AnswerRule("rank", LabelSet(tuple(map(str, ids)), tuple(ids)), 8)
    rows, positions = stage.rows[:6], []

    def note(_: Any, args: Any, given: Any, __: Any) -> None:
        count, length, _width = args[0].shape
        held = given.get("past_key_values")
        positions.append(count * (held.get_seq_length() if held else length))

    model = stage.backbone.model
    part = model.lm_head if family == "seq2seq" else model.model.layers[0]
    hook = part.register_forward_hook(note, with_kwargs=True)
    few = Scorer(stage.backbone, stage.tokenizer, budget).predict(stage.prompt, rows, rule)
    hook.remove()
    every = Scorer(stage.backbone, stage.tokenizer, 100_000).predict(stage.prompt, rows, rule)
    assert max(positions) <= budget
    assert [p.text for p in few] == [p.text for p in every]
    assert len({p.text for p in every}) > 1
    for found, expected in zip(few, every, strict=True):
        assert found.label_scores == pytest.approx(expected.label_scores, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalisation", ["none", "tokens", "characters"])
def test_label_scores_are_log_likelihoods_by_the_length_named(
    stages: dict[str, Stage], family: str, normalisation: str
) -> None:
    stage = stages[family]
    scorer = Scorer(stage.backbone, stage.tokenizer, 300)
    rule = stage.rule("rank", length_normalisation=normalisation)
    found = scorer.predict(stage.prompt, stage.rows[:5], rule)
    lengths = {
        "none": [1] * 5,
        "tokens": [len(ids) for ids in stage.labels.ids],
        "characters": [len(text) for text in stage.labels.texts],
    }[normalisation]
    for row, prediction in zip(stage.rows, found, strict=False):
        with torch.no_grad():
            expected = [
                log_likelihood(stage, row, torch.tensor(ids)) / length
                for ids, length in zip(stage.labels.ids, lengths, strict=True)
            ]
        assert prediction.label_scores == pytest.approx(expected, rel=1e-4)
        assert prediction.text == stage.labels.texts[expected.index(max(expected))]


@torch.no_grad()
@pytest.mark.parametrize("normalisation", ["none", "tokens", "characters"])
def test_label_scores_are_those_after_the_prefix(
    stages: dict[str, Stage], normalisation: Literal["none", "tokens", "characters"]
) -> None:
    stage, prefix = stages["seq2seq"], 40
    texts, ids = stage.labels.texts, stage.labels.ids
    labels = LabelSet(texts, tuple((prefix, *label) for label in ids))
    rule = AnswerRule("rank", labels, 5, normalisation, target_prefix="any")
    found = Scorer(stage.backbone, stage.tokenizer, 300).predict(stage.prompt, stage.rows[:5], rule)
    for row, prediction in zip(stage.rows, found, strict=False):
        alone = log_likelihood(stage, row, torch.tensor([prefix]))
        scores = [log_likelihood(stage, row, torch.tensor(x)) - alone for x in labels.ids]
        divisors = {
            "none": [1] * 5,
            "tokens": [len(label) for label in ids],
            "characters": [len(text) for text in texts],
        }[normalisation]
        expected = [score / by for score, by in zip(scores, divisors, strict=True)]
        assert prediction.label_scores == pytest.approx(expected, rel=1e-4)
        assert prediction.text == texts[expected.index(max(expected))]


def test_one_prefix_is_taken_off_what_is_generated(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    written = stage.predict(stage.rule("greedy"))
    prefix = next(text[:2] for text in written if text[:1].isascii())
    found = stage.predict(stage.rule("greedy", target_prefix=prefix))
    assert found == [text.removeprefix(prefix).strip() for text in written]
    assert found != written


def test_equal_inputs_are_read_once(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    rows_read: list[int] = []
    hook = stage.backbone.embedding.register_forward_hook(
        lambda _, args, __: rows_read.append(len(args[0]))
    )
    rule = stage.rule("rank")
    twice = stage.predict(rule, [*stage.rows[:3], *stage.rows[:3]])
    hook.remove()
    assert twice[:3] == twice[3:] == stage.predict(rule, stage.rows[:3])
    inputs_read = [count for count in rows_read if count != len(stage.labels.ids)]
    assert sum(inputs_read) == 3


def test_the_prompt_matters(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    other = SoftPrompt(-3 * stage.prompt.weight.detach())
    assert stage.predict(stage.rule("rank"), prompt=other) != stage.predict(stage.rule("rank"))


def test_scoring_leaves_mode_gradient_and_random_state_alone(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    stage.backbone.train()
    before = torch.get_rng_state()
    stage.predict(stage.rule("greedy"))
    assert stage.backbone.training
    assert stage.prompt.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    stage.backbone.eval()


def test_no_rows_no_predictions(stages: dict[str, Stage]) -> None:
    stage = stages["seq2seq"]
    assert stage.predict(stage.rule("rank"), []) == []


@pytest.mark.parametrize("method", ["rank", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_predicted_the_same_whatever_comes_with_it(
    stages: dict[str, Stage], family: str, method: Literal["rank", "greedy"]
) -> None:
    stage, rule = stages[family], stages[family].rule(method)
    scorer = Scorer(stage.backbone, stage.tokenizer, batch_tokens=200)
    blocks = [stage.rows[:9], [], stage.rows[7:16]]
    together = scorer.predict_blocks(stage.prompt, blocks, rule)
    apart = [p for block in blocks for p in scorer.predict(stage.prompt, block, rule)]
    assert together == apart
    assert len(together) == 18


def test_a_causal_model_answers_free_text(stages: dict[str, Stage]) -> None:
    stage = stages["causal"]
    expected = stage.predict(stage.rule("greedy"))
    assert stage.predict(AnswerRule("greedy", LabelSet((), ()), 4)) == expected


@pytest.mark.parametrize(("pad", "end", "expected"), [(0, 1, 0), (None, 1, 1), (None, None, 0)])
def test_any_piece_pads_where_a_tokenizer_has_none_for_it(
    pad: int | None, end: int | None, expected: int
) -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
    assert pad_id_of(tokenizer) == expected
