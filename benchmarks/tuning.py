"""Steps of prompt tuning: PEFT with the Hugging Face Trainer and DeepSpeed, and ours, same rows.

python -m benchmarks.tuning
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import rows, tuning_table
from benchmarks.models import SHAPES, TINY_TOKENIZER, ensure_checkpoint, num_parameters
from benchmarks.ranks import run_ranks
from benchmarks.report import Report, parser, settings_of
from benchmarks.tuning_table import (
    OURS_INT8,
    OURS_REPLICATED,
    OURS_ZERO3,
    PEER,
    PEER_SCALED,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    PEER: ("peft_trainer", {"scale_live_window": False}),
    PEER_SCALED: ("peft_trainer", {"scale_live_window": True}),
    OURS_ZERO3: ("our_run", {"sharding": "zero3"}),
    OURS_INT8: ("our_run", {"sharding": "zero3", "quantization": "int8"}),
    OURS_REPLICATED: ("our_run", {"sharding": "replicated"}),
}
KEYS = {"a": PEER, "a2": PEER_SCALED, "b": OURS_ZERO3, "c": OURS_INT8, "d": OURS_REPLICATED}
WARM_UP_STEPS = 1


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parser("tuning", "Examples per second of prompt tuning, and where a step's time goes")
    options.add_argument("--size", choices=sorted(SHAPES), default="200m")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--steps", type=int, default=4, help="after a warm-up step")
    options.add_argument("--prompt-length", type=int, default=100)
    options.add_argument("--global-batch", type=int, default=16)
    options.add_argument("--micro-batch", type=int, default=4)
    options.add_argument("--fixed-length", type=int, default=512)
    options.add_argument(
        "--lengths", nargs="+", choices=("real", "fixed"), default=["real", "fixed"]
    )
    options.add_argument("--variants", nargs="+", choices=list(KEYS), default=list(KEYS))
    options.add_argument("--boolq", type=Path, help="jsonl(.gz) with question, passage and label")
    options.add_argument("--tokenizer", type=Path, default=TINY_TOKENIZER)
    given = options.parse_args(argv)
    shape = SHAPES[given.size]
    folder = ensure_checkpoint(given.out / "models" / f"t5-{given.size}-fp32", shape, "fp32")
    title = (
        f"Prompt tuning of a frozen T5 of {num_parameters(shape) / 1e6:.0f} M parameters, fp32, "
        f"prompt {given.prompt_length}, batch {given.global_batch} in micro-batches of "
        f"{given.micro_batch}, {given.ranks} ranks of one thread"
    )
    report = Report("tuning", title, settings_of(given))
    peak = run_ranks(
        "benchmarks.flops:matmul_peak",
        {"size": 1024, "dtype": "float32", "seconds": 3.0},
        num_ranks=given.ranks,
    )
    report.raw["matmul_peak"] = peak
    peak_flops = sum(answer["flops_per_second"] for answer in peak)
    for lengths in given.lengths:
        recipe = make_recipe(given, folder, lengths)
        measured = {KEYS[k]: _measure(KEYS[k], recipe, given) for k in given.variants}
        report.raw[lengths] = measured
        summaries = {name: tuning_table.summarise(answers) for name, answers in measured.items()}
        report.rows += [
            tuning_table.row(f"{name}, {lengths}", s, summaries.get(PEER), peak_flops)
            for name, s in summaries.items()
        ]
        report.aims += tuning_table.aims(summaries, lengths, peak_flops)
        report.notes += tuning_table.loss_note(summaries, lengths)
    report.notes.append(f"Matmul peak of the ranks together: {peak_flops / 1e9:.0f} GFLOP/s.")
    report.publish(given.out)


def make_recipe(given: Any, folder: Path, lengths: str) -> dict[str, Any]:
    """Write the rows, and return the recipe that all variants follow."""
    tokenizer = AutoTokenizer.from_pretrained(str(given.tokenizer))
    count = given.global_batch * (given.steps + WARM_UP_STEPS)
    if lengths == "real":
        train = rows.real_rows(count, tokenizer, given.boolq)
    else:
        train = rows.fixed_rows(count, given.fixed_length, tokenizer)
    data = given.out / "data"
    files = {
        "train": rows.write_rows(data / f"{lengths}.jsonl", train),
        # Scored once, at the end, as every run of ours is; outside the times.
        "validation": rows.write_rows(data / "validation.jsonl", train[:1]),
        "test": rows.write_rows(data / "test.jsonl", train[:1]),
    }
    return {
        "steps": given.steps + WARM_UP_STEPS,
        "backbone": {
            "path": str(folder.resolve()),
            "dtype": "fp32",
            "max_input_tokens": given.fixed_length,
        },
        "task": {
            "name": lengths,
            "source": {"kind": "files", **{k: str(v.resolve()) for k, v in files.items()}},
            "labels": rows.LABELS,
        },
        "prompt": {
            "prompt_length": given.prompt_length,
            "initialisation": "random_uniform_paper",
        },
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.0},
        "batch": {
            "global_batch_size": given.global_batch,
            "micro_batch_size": given.micro_batch,
        },
        "evaluation": {"method": "rank", "every_steps": 1000},
    }


def _measure(name: str, recipe: Mapping[str, Any], given: Any) -> list[dict[str, Any]]:
    function, settings = VARIANTS[name]
    own = dict(settings)
    scaled = own.pop("scale_live_window", False)
    mine = {**recipe, "backbone": {**recipe["backbone"], **own}}
    return run_ranks(
        f"benchmarks.tuning_ranks:{function}",
        {"recipe": mine, "warm_up_steps": WARM_UP_STEPS, "scale_live_window": scaled},
        num_ranks=given.ranks,
    )


if __name__ == "__main__":
    main()
