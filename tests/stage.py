"""What scoring needs: a backbone, rows, a label set and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from softprompt_dist.backbone.load import load_backbone, load_tokenizer
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenExample, tokenise
from softprompt_dist.data.examples import Example
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.scoring import AnswerRule, LabelSet, Scorer
from tests import runs

_LABELS = LabelSet(
    ("one", "two", "three", "four", "five"),
    ((20, 1), (21, 30, 1), (22, 1), (23, 31, 32, 1), (24, 33, 1)),
)


class Stage:
    """All of them for one folder, whose weights are large enough for rows to differ in answers."""

    def __init__(
        self, folder: str | Path, *, num_rows: int = 23, sharded: bool = False, **settings: Any
    ) -> None:
        sharding: Any = "zero3" if sharded else "replicated"
        config = BackboneConfig(path=str(folder), **{"sharding": sharding, **settings})
        self.backbone = load_backbone(config, runs.PARTITION_EVERYTHING if sharded else None)
        self.tokenizer = load_tokenizer(Path(folder))
        texts = [row["text"] for row in runs.make_rows(num_rows, seed=11)]
        self.rows = tokenise(
            [Example(text, text) for text in texts],
            self.tokenizer,
            family=self.backbone.family,
            max_input_tokens=48,
            append_eos=True,
        ).examples
        self.labels = _LABELS
        generator = torch.Generator().manual_seed(1)
        self.prompt = SoftPrompt(torch.randn(4, 32, generator=generator))

    def rule(self, method: Literal["rank", "greedy"], **settings: Any) -> AnswerRule:
        """How answers to this stage's rows are found."""
        longest = max(len(ids) for ids in self.labels.ids)
        return AnswerRule(method, self.labels, longest, **settings)

    def predict(
        self,
        rule: AnswerRule,
        rows: Sequence[TokenExample] | None = None,
        *,
        batch_tokens: int = 200,
        prompt: SoftPrompt | None = None,
    ) -> list[str]:
        """All ranks: what the stage's prompt answers to all rows, or to these."""
        scorer = Scorer(self.backbone, self.tokenizer, batch_tokens)
        chosen = self.rows if rows is None else rows
        return [p.text for p in scorer.predict(prompt or self.prompt, chosen, rule)]
