"""The stages that a model went through, and the README.md that tells of them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

import softprompt_dist
from softprompt_dist.redaction import redact_command

SAID_OF_STAGES = ("name", "objective", "steps", "tokens", "seconds", "corpus", "command")
"""What a card says of each stage, whichever release wrote of it."""
EXPORTED = "exported"
"""In the last stage of an exported folder: the identity of what lies beside it."""


@dataclass(frozen=True)
class Stage:
    """What one run of `softprompt adapt` did to a model."""

    name: str
    objective: str
    steps: int
    tokens: int
    """Of text that the model has seen, without padding."""
    validation: dict[str, float]
    """Name -> measure on the validation text; empty without one."""
    seconds: float
    """Spent in updates."""
    corpus: list[str]
    corpus_fingerprint: str
    recipe: dict[str, Any]
    """The whole of it."""
    identity: str
    """`identity_of` what decided the weights, but for the number of steps."""
    source: dict[str, Any] = field(default_factory=dict)
    """The identity of what it started from, as JSON."""

    def to_json(self) -> dict[str, Any]:
        """The entry of adaptation.json; no folder of this machine is in it."""
        return _without_folders(asdict(self)) | {
            "command": " ".join(_without_folders(redact_command(sys.orig_argv))),
            "version": softprompt_dist.__version__,
            "date": date.today().isoformat(),
        }


def identity_of(decisive: Mapping[str, Any], earlier_stages: Sequence[Mapping[str, Any]]) -> str:
    """A sha256 of the settings and fingerprints that decide an adaptation's weights.

    `earlier_stages` are those that its source went through.
    """
    document = json.dumps([dict(decisive), list(earlier_stages)], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def model_card(
    name: str, num_parameters: int, model_type: str, stages: Sequence[Mapping[str, Any]]
) -> str:
    """The README.md of an exported folder; the last of `stages` has made it what it is."""
    last = stages[-1]
    parts = [
        f"# {name}",
        f"A language model of type {model_type} with {num_parameters:,} parameters, trained by "
        "`softprompt adapt`. All of its weights are trained; use it as a backbone of "
        "`softprompt train`, or in transformers.",
        _stage_table(stages),
        *_identity(last.get(EXPORTED)),
        "## Validation\n\n" + _validation(last.get("validation", {})),
        "## Corpus\n\n" + "\n".join(map(_corpus, stages)),
        "## Commands\n\n```\n" + "\n".join(stage["command"] for stage in stages) + "\n```",
        f"## Recipe of {last['name']}\n\n```yaml\n{_yaml(last.get('recipe', {}))}```",
    ]
    return "\n\n".join(parts) + "\n"


def _identity(exported: Mapping[str, Any] | None) -> list[str]:
    if exported is None:
        return []
    weights, vocabulary = exported["weights"], exported["tokenizer"]["vocabulary"]
    return [
        f"A prompt that was tuned on it has in its identity the weights `{weights}` and the "
        f"vocabulary `{vocabulary}`."
    ]


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "| stage | objective | steps | tokens seen | validation loss (nats per target token) | "
        "minutes |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(
        f"| {s['name']} | {s['objective']} | {s['steps']:,} | {s['tokens']:,} | {_loss(s)} | "
        f"{s['seconds'] / 60:,.0f} |"
        for s in stages
    )


def _loss(stage: Mapping[str, Any]) -> str:
    """Of the stage's own objective; earlier releases measured that alone."""
    measures = stage.get("validation", {})
    loss = measures.get(f"{stage['objective']}_nll", stage.get("validation_loss"))
    return "not measured" if loss is None else f"{loss:.3f}"


def _validation(measures: Mapping[str, float]) -> str:
    if not measures:
        return "Nothing was measured: the recipe names no validation text."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in measures.items())
    return f"| measure | value |\n|---|---|\n{rows}"


def _corpus(stage: Mapping[str, Any]) -> str:
    fingerprint = stage.get("corpus_fingerprint")
    suffix = f" (fingerprint `{fingerprint}`)" if fingerprint else ""
    return f"- {stage['name']}: {', '.join(stage['corpus'])}{suffix}"


def _yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def _without_folders(value: Any) -> Any:
    """Paths reduced to their last part: a card must not tell how a machine is laid out."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
