"""Prompts tuned in one cell, scored in every other; and what each cell does to the loss.

python -m benchmarks.portability --prompt fp32=runs/a/prompt/best.safetensors --prompt int8=...
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Report, parser, settings_of

CELLS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "int8": {"quantization": "int8"},
    "int8, wo whole": {"quantization": "int8", "quantized_layers": "blocks_without_wo"},
    "llm_int8": {"quantization": "llm_int8"},
    "llm_int8, no outliers": {"quantization": "llm_int8", "outlier_threshold": 0.0},
    "nf4": {"quantization": "nf4"},
}
"""Name -> settings of the backbone section; replicated, since sharding changes no number."""


def main(argv: Sequence[str] | None = None) -> None:
    """Score every prompt in every cell."""
    options = parser("portability", "Score prompts in every precision.")
    options.add_argument("--recipe", default="demo")
    options.add_argument("--set", action="append", default=[], dest="overrides")
    options.add_argument("--prompt", action="append", required=True, metavar="NAME=PATH")
    options.add_argument("--rows", type=int, default=400, help="of the test split")
    options.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    options.add_argument("--force", action="store_true", help="prompts of another backbone, too")
    given = options.parse_args(argv)
    prompts = dict(text.split("=", 1) for text in given.prompt)
    measured = {name: _measure(CELLS[name], prompts, given) for name in given.cells}
    title = f"Prompts tuned in one cell, scored in others (`{given.recipe}`, {given.rows} rows)"
    report = Report("portability", title, settings_of(given), raw=measured)
    report.rows = [_row(name, cell, prompts) for name, cell in measured.items()]
    report.notes = [
        "Score in percent / loss in nats per target token. Weights: bytes that a rank holds."
    ]
    report.publish(given.out)


def _measure(settings: dict[str, Any], prompts: dict[str, str], given: Any) -> dict[str, Any]:
    from softprompt_dist.config import TuneConfig
    from softprompt_dist.prompt.file import load_prompt
    from softprompt_dist.prompt.module import SoftPrompt
    from softprompt_dist.recipe import load_recipe
    from softprompt_dist.run.tuning import build_bench

    overrides = [f"backbone.{key}={value}" for key, value in settings.items()]
    overrides += ["backbone.sharding=replicated", *given.overrides]
    config = load_recipe(TuneConfig, given.recipe, overrides)
    bench = build_bench(config, splits=["test"])
    split = bench.task.splits["test"].sample(given.rows)
    held = sum(t.numel() * t.element_size() for _, t in bench.backbone.held_tensors())
    answer: dict[str, Any] = {"bytes": held}
    for name, path in prompts.items():
        prompt_PD, _ = load_prompt(Path(path), backbone=bench.identity, force=given.force)
        prompt = SoftPrompt(prompt_PD)
        start = time.perf_counter()
        predictions = bench.predict(prompt, bench.task, split, "scoring")
        seconds = time.perf_counter() - start
        score = bench.task.judge(predictions, split.texts).score
        answer[name] = {"score": score, "seconds": seconds, "loss": _loss(bench, prompt, split)}
    return answer


def _loss(bench: Any, prompt: Any, split: Any) -> float:
    """Mean over the target tokens of the rows."""
    import torch

    from softprompt_dist.data.batching import collate
    from softprompt_dist.data.bucketing import batches_by_length
    from softprompt_dist.run.loss import token_loss
    from softprompt_dist.run.scoring import pad_id_of

    total = num_tokens = 0.0
    pad_id, family = pad_id_of(bench.tokenizer), bench.backbone.family
    batches = batches_by_length(
        split.tokens.input_lengths,
        prompt_length=prompt.weight.shape[0],
        budget=bench.config.evaluation.batch_tokens,
        extra=int(split.tokens.target_lengths.max()),
    )
    with torch.no_grad():
        for chosen in batches:
            rows = [split.tokens[index] for index in chosen]
            batch = collate(rows, pad_id=pad_id, family=family)
            prompt_BPD = prompt(len(batch.input_ids_BS), bench.backbone.dtype)
            loss = token_loss(bench.backbone(prompt_BPD, batch), batch.labels_BT)
            total += float(loss.total)
            num_tokens += float(loss.num_tokens)
    return total / num_tokens


def _row(name: str, cell: dict[str, Any], prompts: dict[str, str]) -> dict[str, str]:
    scores = {
        f"tuned on {tuned}": f"{cell[tuned]['score']:.1f} / {cell[tuned]['loss']:.4f}"
        for tuned in prompts
    }
    seconds = [cell[tuned]["seconds"] for tuned in prompts]
    return {
        "scored on": name,
        **scores,
        "weights, MB": f"{cell['bytes'] / 1e6:.0f}",
        "seconds to score": f"{min(seconds):.0f}",
    }


if __name__ == "__main__":
    main()
