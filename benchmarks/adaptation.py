"""Steps of LM adaptation: the Hugging Face Trainer with DeepSpeed, and ours, on the same text.

python -m benchmarks.adaptation --text FILE ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import adaptation_table as tables
from benchmarks.models import SHAPES, ensure_checkpoint, num_parameters
from benchmarks.ranks import run_ranks
from benchmarks.report import Report, parser, settings_of

WARM_UP_STEPS = 1
_SPANS = {"objective": "span_corruption", "packing": "none"}
_ONE_A_ROW = {"objective": "prefix_lm", "packing": "none"}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    tables.PEER: ("hf_trainer", _ONE_A_ROW, {"padding": "longest"}),
    tables.PEER_MAX: ("hf_trainer", _ONE_A_ROW, {"padding": "max_length"}),
    tables.OURS: ("our_run", _ONE_A_ROW | {"packing": "greedy"}, {}),
    tables.OURS_PAIRS: ("our_run", _ONE_A_ROW | {"packing": "complementary_pairs"}, {}),
    tables.PEER_SPANS: ("hf_trainer", _SPANS, {"padding": "longest"}),
    tables.OURS_SPANS: ("our_run", _SPANS, {}),
}
"""Name -> function of `adaptation_ranks`, its part of the recipe, its settings."""
KEYS = dict(zip("abcdef", VARIANTS, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    given = _options().parse_args(argv)
    shape = SHAPES[given.size]
    folder = ensure_checkpoint(given.out / "models" / f"t5-{given.size}-fp32", shape, "fp32")
    report = Report("adaptation", _title(given, num_parameters(shape)), settings_of(given))
    peak_flops = _matmul_peak(report, given)
    rounds: tables.Rounds = {KEYS[key]: [] for key in given.variants}
    for _ in range(given.rounds):
        for name, answers in rounds.items():
            answers.append(_measure(name, folder, given))
    report.raw["rounds"] = rounds
    summaries = {name: tables.summarise(answers) for name, answers in rounds.items()}
    report.rows = [tables.row(name, summaries, peak_flops) for name in summaries]
    report.aims = tables.aims(summaries, peak_flops)
    report.notes = tables.notes(summaries, peak_flops)
    _pipeline(report, summaries, folder, given)
    report.publish(given.out)


def make_recipe(name: str, folder: Path, given: Any) -> dict[str, Any]:
    """What a variant trains and on what; z-loss is left out, which the peer does not have."""
    _, own, _ = VARIANTS[name]
    of_spans = own["objective"] == "span_corruption"
    return {
        **own,
        "steps": given.steps + WARM_UP_STEPS,
        "backbone": str(folder.resolve()),
        "corpus": [str(Path(name).resolve()) for name in given.text],
        "inputs_length": given.inputs_length,
        "targets_length": given.span_targets_length if of_spans else given.inputs_length,
        "z_loss": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "engine": {"zero_stage": given.zero_stage},
        "batch": {"global_batch_size": given.global_batch, "micro_batch_size": given.micro_batch},
    }


def _options() -> Any:
    options = parser("adaptation", "Tokens per second of LM adaptation")
    options.add_argument("--text", nargs="+", required=True, help="a document a line")
    options.add_argument("--size", choices=sorted(SHAPES), default="28m")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--steps", type=int, default=2, help="of a round, after a warm-up step")
    options.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    options.add_argument("--global-batch", type=int, default=8, help="rows")
    options.add_argument("--micro-batch", type=int, default=4, help="rows; ours")
    options.add_argument("--peer-micro-batch", type=int, default=8, help="examples; the peer's")
    options.add_argument("--inputs-length", type=int, default=512)
    options.add_argument("--span-targets-length", type=int, default=114)
    options.add_argument("--pipeline-seconds", type=float, default=5.0)
    options.add_argument("--variants", nargs="+", choices=list(KEYS), default=list(KEYS))
    return options


def _title(given: Any, num_weights: int) -> str:
    return (
        f"LM adaptation of a T5 v1.1 of {num_weights / 1e6:.0f} M parameters, fp32, Adafactor, "
        f"ZeRO stage {given.zero_stage}, {given.global_batch} rows a batch, "
        f"{given.ranks} ranks of one thread"
    )


def _matmul_peak(report: Report, given: Any) -> float:
    settings = {"size": 1024, "dtype": "float32", "seconds": 2.0}
    answers = run_ranks("benchmarks.flops:matmul_peak", settings, num_ranks=given.ranks)
    report.raw["matmul_peak"] = answers
    return float(sum(answer["flops_per_second"] for answer in answers))


def _measure(name: str, folder: Path, given: Any) -> list[dict[str, Any]]:
    function, _, own = VARIANTS[name]
    return run_ranks(
        f"benchmarks.adaptation_ranks:{function}",
        {
            "recipe": make_recipe(name, folder, given),
            "cache": str((given.out / "cache").resolve()),
            "warm_up_steps": WARM_UP_STEPS,
            "micro_batch": given.peer_micro_batch,
            **own,
        },
        num_ranks=given.ranks,
    )


def _pipeline(report: Report, summaries: tables.Summaries, folder: Path, given: Any) -> None:
    """How fast one core makes the rows that our variants read."""
    names = [name for name in summaries if VARIANTS[name][0] == "our_run"]
    settings = {
        "recipes": {name: make_recipe(name, folder, given) for name in names},
        "cache": str((given.out / "cache").resolve()),
        "seconds": given.pipeline_seconds,
    }
    (answer,) = run_ranks("benchmarks.adaptation_ranks:pipeline", settings, num_ranks=1)
    report.raw["pipeline"] = answer
    report.aims += [tables.pipeline_aim(name, answer[name], summaries[name]) for name in names]


if __name__ == "__main__":
    main()
