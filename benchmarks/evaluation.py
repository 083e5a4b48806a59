"""Scoring a prompt: our batches under a token budget, the same padded, and PEFT with the Trainer.

python -m benchmarks.evaluation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from benchmarks import rows
from benchmarks.models import SHAPES, TINY_TOKENIZER, ensure_checkpoint, num_parameters
from benchmarks.ranks import run_ranks
from benchmarks.report import GB, Aim, Report, parser, settings_of

OURS, PADDED, PEER = "ours", "ours, padded", "PEFT + Trainer.predict"
VARIANTS = {OURS: "ours", PADDED: "ours_padded", PEER: "peft_trainer"}
METHODS = ("greedy", "rank")
_PASSED_ON = ("prompt_length", "fixed_length", "batch_size", "batch_tokens", "methods")
Rounds = dict[str, list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    given = _options().parse_args(argv)
    shape = SHAPES[given.size]
    folder = ensure_checkpoint(given.out / "models" / f"t5-{given.size}-fp32", shape, "fp32")
    tokenizer = AutoTokenizer.from_pretrained(str(given.tokenizer))
    made = rows.real_rows(given.rows, tokenizer, given.boolq)
    settings = {
        "path": str(folder.resolve()),
        "rows": str(rows.write_rows(given.out / "data" / "evaluation.jsonl", made).resolve()),
        **{name: getattr(given, name) for name in _PASSED_ON},
    }
    rounds: Rounds = {name: [] for name in VARIANTS}
    for _ in range(given.rounds):
        for name, function in VARIANTS.items():
            target = f"benchmarks.evaluation_ranks:{function}"
            rounds[name] += run_ranks(target, settings, num_ranks=1)
    title = (
        f"Scoring {given.rows} rows with a prompt of {given.prompt_length} on a T5 of "
        f"{num_parameters(shape) / 1e6:.0f} M parameters, fp32, one thread"
    )
    report = Report("evaluation", title, settings_of(given), raw=dict(rounds))
    for method in given.methods:
        report.rows += table(rounds, method, given.prompt_length)
        report.aims += aims(rounds, method)
    report.notes = [_note(given)]
    report.publish(given.out)


def _options() -> Any:
    options = parser("evaluation", "Tokens per second of scoring, at real lengths")
    options.add_argument("--size", choices=sorted(SHAPES), default="77m")
    options.add_argument("--rows", type=int, default=256)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--prompt-length", type=int, default=100)
    options.add_argument("--fixed-length", type=int, default=512)
    options.add_argument("--batch-size", type=int, default=8, help="rows; padded, and PEFT")
    options.add_argument("--batch-tokens", type=int, default=2048, help="positions; ours")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--boolq", type=Path, help="jsonl(.gz) with question, passage and label")
    options.add_argument("--tokenizer", type=Path, default=TINY_TOKENIZER)
    return options


def table(rounds: Rounds, method: str, prompt_length: int) -> list[dict[str, str]]:
    """A line for each variant; tokens are those of the inputs, without prompt and padding."""
    lines = []
    for name in VARIANTS:
        first = rounds[name][0]
        needed = first["input_tokens"] + prompt_length * len(first[method]["answers"])
        lines.append(
            {
                "path, method": f"{name}, {method}",
                "tokens/s": f"{tokens_per_second(rounds[name], method):.0f}",
                **{
                    f"over {other}": f"{_ratio(rounds, name, other, method):.2f}x"
                    for other in (PADDED, PEER)
                },
                "seconds": f"{_seconds(rounds[name], method):.1f}",
                "read / needed": f"{first[method]['positions'] / needed:.2f}",
                "answers as PEFT's": f"{agreement(rounds, name, method):.1%}",
                "score difference": _text(largest_difference(rounds, name, method)),
                "peak RSS, GB": f"{first[method]['peak_rss_bytes'] / GB:.2f}",
            }
        )
    return lines


def aims(rounds: Rounds, method: str) -> list[Aim]:
    """Speed over both others, and the same answers as the peer."""
    found = [
        Aim(f"tokens/s, ours over padded, {method}", _ratio(rounds, OURS, PADDED, method), 3, True),
        Aim(f"tokens/s, ours over PEFT, {method}", _ratio(rounds, OURS, PEER, method), 1.5, True),
    ]
    for name in (OURS, PADDED):
        same = 100 * agreement(rounds, name, method)
        found.append(Aim(f"answers as PEFT's, {name}, {method}, %", same, 99, True))
    return found


def tokens_per_second(measured: Sequence[Mapping[str, Any]], method: str) -> float:
    """Input tokens over the median round's seconds."""
    return float(measured[0]["input_tokens"]) / _seconds(measured, method)


def agreement(rounds: Rounds, name: str, method: str) -> float:
    """Share of the rows that a variant and the peer answer alike."""
    theirs, own = (rounds[who][0][method]["answers"] for who in (PEER, name))
    return sum(a == b for a, b in zip(theirs, own, strict=True)) / len(own)


def largest_difference(rounds: Rounds, name: str, method: str) -> float | None:
    """Of a label's log-probability from the peer's, in nats; None for generated answers."""
    theirs, own = (rounds[who][0][method]["label_scores"] for who in (PEER, name))
    if own[0] is None:
        return None
    return max(
        abs(a - b)
        for of_peer, of_own in zip(theirs, own, strict=True)
        for a, b in zip(of_peer, of_own, strict=True)
    )


def _ratio(rounds: Rounds, name: str, other: str, method: str) -> float:
    return _seconds(rounds[other], method) / _seconds(rounds[name], method)


def _seconds(measured: Sequence[Mapping[str, Any]], method: str) -> float:
    return median(answer[method]["seconds"] for answer in measured)


def _text(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"


def _note(given: Any) -> str:
    return (
        f"Medians of {given.rounds} rounds. Padded: every input to {given.fixed_length}, "
        f"{given.batch_size} rows a batch. PEFT: {given.batch_size} rows a batch, padded to its "
        f"longest; greedy by Seq2SeqTrainer, rank with each row once for each label. Ours: "
        f"{given.batch_tokens} positions a batch. Read / needed: positions with padding over those "
        "without. Score difference: the largest from PEFT's log-probability of a label, in nats."
    )


if __name__ == "__main__":
    main()
