"""Logits and prompt gradient of plain Hugging Face models, to compare a backbone with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.data.batching import TokenExample, collate

PROMPT_LENGTH = 3
EXAMPLES = (
    TokenExample((5, 6, 7, 8, 1), (20, 1)),
    TokenExample((9, 10, 1), (21, 22, 23, 1)),
    TokenExample((11, 12, 13, 14, 15, 16, 1), (24, 1)),
)


class Result(NamedTuple):
    """What one pass over some examples gives."""

    logits: list[Tensor]
    """Of each example: [targets, V]."""
    gradient_PD: Tensor
    """Of the mean of all targets' negative log-likelihoods."""


def make_prompt(d_model: int) -> Tensor:
    """[P, D], the same at every call, of the size of embeddings."""
    return torch.randn(PROMPT_LENGTH, d_model, generator=torch.Generator().manual_seed(3))


def ours(backbone: Backbone, examples: Sequence[TokenExample] = EXAMPLES) -> Result:
    """All examples in one batch, padded where they differ in length."""
    prompt_PD = make_prompt(backbone.d_model).requires_grad_(True)
    batch = collate(examples, pad_id=0, family=backbone.family)
    logits_BTV = backbone(prompt_PD.expand(len(examples), -1, -1), batch).float()
    logits = [row[: len(e.target_ids)] for row, e in zip(logits_BTV, examples, strict=True)]
    return _result(prompt_PD, logits, examples)


@torch.no_grad()
def plain_logits(model: Any, examples: Sequence[TokenExample] = EXAMPLES) -> list[Tensor]:
    """In whatever precision the model is."""
    return [row.float() for row in _plain_logits(model, make_prompt(_width(model)), examples)]


def plain(model: Any, examples: Sequence[TokenExample] = EXAMPLES) -> Result:
    """Each example alone, so that nothing is ever padded."""
    prompt_PD = make_prompt(_width(model)).requires_grad_(True)
    return _result(prompt_PD, _plain_logits(model, prompt_PD, examples), examples)


def assert_equal(found: Result, expected: Result, logits: float, gradient: float) -> None:
    """Within these absolute differences, and not because there is nothing to differ in."""
    for found_TV, expected_TV in zip(found.logits, expected.logits, strict=True):
        assert expected_TV.std() > 0.01
        torch.testing.assert_close(found_TV, expected_TV, rtol=0, atol=logits)
    assert expected.gradient_PD.abs().max() > 100 * gradient
    torch.testing.assert_close(found.gradient_PD, expected.gradient_PD, rtol=0, atol=gradient)


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _plain_logits(model: Any, prompt_PD: Tensor, examples: Sequence[TokenExample]) -> list[Tensor]:
    embed = model.get_input_embeddings()
    prompt_PD = prompt_PD.to(embed.weight.dtype)
    logits = []
    for example in examples:
        target_T = torch.tensor(example.target_ids)
        embeds_SD = torch.cat([prompt_PD, embed(torch.tensor(example.input_ids))])
        if model.config.is_encoder_decoder:
            logits.append(model(inputs_embeds=embeds_SD[None], labels=target_T[None]).logits[0])
            continue
        embeds_SD = torch.cat([embeds_SD, embed(target_T)])
        start = PROMPT_LENGTH + len(example.input_ids)
        logits.append(model(inputs_embeds=embeds_SD[None]).logits[0, start - 1 : -1])
    return logits


def _result(prompt_PD: Tensor, logits: list[Tensor], examples: Sequence[TokenExample]) -> Result:
    losses = [
        torch.nn.functional.cross_entropy(row, torch.tensor(e.target_ids), reduction="sum")
        for row, e in zip(logits, examples, strict=True)
    ]
    num_targets = sum(len(e.target_ids) for e in examples)
    (torch.stack(losses).sum() / num_targets).backward()
    assert prompt_PD.grad is not None
    return Result([row.detach() for row in logits], prompt_PD.grad)
