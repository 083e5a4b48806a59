"""What a checkpoint costs training: of all weights, beside it or in its way; and of a prompt.

python -m benchmarks.saving
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.models import SHAPES, TINY_TOKENIZER
from benchmarks.ranks import run_ranks
from benchmarks.report import Aim, Report, parser, settings_of

NONE, BESIDE, FOREGROUND = "none", "background", "foreground"
VARIANTS = (NONE, BESIDE, FOREGROUND)
_STEPS_OF_A_SAVE = 10
"""Of tuning: the prompt's checkpoint is said to be affordable that often."""
_WORDS = ["a", "model", "reads", "on", "and", "learns", "how", "any", "text", "goes", "on"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    given = _options().parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "recipe": _recipe(given),
        "cache": str((given.out / "cache").resolve()),
        "checkpoints": str((given.out / "saving-checkpoints").resolve()),
        "variants": list(VARIANTS),
        "rounds": given.rounds,
        "steps": given.steps,
    }
    adaptation = run_ranks("benchmarks.saving_ranks:adaptation", settings, num_ranks=given.ranks)
    prompt_settings = {
        "folder": str((given.out / "saving-prompt").resolve()),
        "shape": [given.prompt_length, given.d_model],
        "saves": given.saves,
    }
    prompt = run_ranks("benchmarks.saving_ranks:prompt", prompt_settings)
    title = (
        f"A checkpoint of {adaptation[0]['num_weights'] / 1e6:.0f} M weights with AdamW "
        f"({adaptation[0]['bytes'] / 1e6:.0f} MB), fp32, {given.ranks} rank(s) of one thread, "
        "ZeRO-2, on this machine's disk"
    )
    report = Report("saving", title, settings_of(given), rows=table(adaptation))
    report.raw = {"adaptation": adaptation, "prompt": prompt}
    share = share_of_tuning(prompt, given.step_seconds)
    report.notes = [*_notes(given, adaptation), _prompt_note(given, prompt, share)]
    report.aims = [
        Aim("seconds blocked, background over foreground", _ratio(adaptation), 0.2),
        Aim(f"a prompt's checkpoint every {_STEPS_OF_A_SAVE} steps, % of their time", share, 1),
    ]
    report.publish(given.out)


def _options() -> Any:
    options = parser("saving", "Seconds that training loses to a checkpoint")
    options.add_argument("--size", choices=sorted(SHAPES), default="28m")
    options.add_argument("--ranks", type=int, default=2, help="that adapt; each takes a core")
    options.add_argument("--rounds", type=int, default=4, help="each saves once in each way")
    options.add_argument("--steps", type=int, default=8, help="between two saves")
    options.add_argument("--rows", type=int, default=16, help="of a step")
    options.add_argument("--prompt-length", type=int, default=27)
    options.add_argument("--d-model", type=int, default=576)
    options.add_argument("--saves", type=int, default=30, help="of the prompt")
    options.add_argument(
        "--step-seconds", type=float, default=5.0, help="of tuning; the demo's on two cores"
    )
    return options


def _recipe(given: Any) -> dict[str, Any]:
    text = given.out / "data" / "saving.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(_WORDS[k % 7 : 8 + k % 6] * (2 + k % 5)) for k in range(4000)]
    text.write_text("\n".join(lines), encoding="utf-8")
    shape = dict(SHAPES[given.size])
    shape.pop("vocab_size")
    return {
        "init": "from_config",
        "architecture": shape,
        "tokenizer": str(TINY_TOKENIZER),
        "corpus": [str(text.resolve())],
        "objective": "span_corruption",
        "inputs_length": 64,
        "targets_length": 64,
        "optimizer": "rms_scaled_adamw",
        "learning_rate": 0.001,
        "schedule": "constant",
        "engine": {"zero_stage": 2},
        "batch": {"global_batch_size": given.rows, "micro_batch_size": given.rows // 2},
    }


def periods(answers: Sequence[Mapping[str, Any]], variant: str, name: str) -> list[float]:
    """A number of each round, of the slower rank."""
    rounds = zip(*(answer["rounds"][variant] for answer in answers), strict=True)
    return [max(period[name] for period in of_ranks) for of_ranks in rounds]


def added(answers: Sequence[Mapping[str, Any]], variant: str, name: str) -> float:
    """What a save adds to the steps from it to the next; the median over the rounds."""
    ours, plain = (periods(answers, which, name) for which in (variant, NONE))
    return median(a - b for a, b in zip(ours, plain, strict=True))


def table(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line for each way to save."""
    return [
        {
            "saving": variant,
            "seconds blocked": f"{median(periods(answers, variant, 'blocked')):.2f}",
            "seconds lost": f"{added(answers, variant, 'seconds'):.2f}",
            "CPU seconds of a rank": f"{added(answers, variant, 'cpu'):.2f}",
            "seconds until published": f"{median(periods(answers, variant, 'published')):.2f}",
            "seconds of a step": f"{median(_steps(answers, variant)):.2f}",
        }
        for variant in VARIANTS
    ]


def _steps(answers: Sequence[Mapping[str, Any]], variant: str) -> list[float]:
    return [s / answers[0]["steps"] for s in periods(answers, variant, "updates")]


def _ratio(answers: Sequence[Mapping[str, Any]]) -> float:
    ours, plain = (median(periods(answers, name, "blocked")) for name in (BESIDE, FOREGROUND))
    return ours / plain


def share_of_tuning(answers: Sequence[Mapping[str, Any]], step_seconds: float) -> float:
    """Percent of the time of the steps between two saves of a prompt."""
    seconds = median(max(pair) for pair in zip(*(a["seconds"] for a in answers), strict=True))
    return 100 * seconds / (_STEPS_OF_A_SAVE * step_seconds)


def _notes(given: Any, answers: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"Medians over {given.rounds} rounds of {given.steps} steps, each begun with a save. "
        "blocked: until the next update may begin (the copy; or the whole save). lost: what the "
        "steps from a save to the next take more than without any; where every core has a rank, "
        "the writers' CPU seconds are among it, which a node with GPUs has to spare (--ranks 1). "
        f"The first copy also makes its memory: {_first_blocked(answers):.2f} s.",
    ]


def _first_blocked(answers: Sequence[Mapping[str, Any]]) -> float:
    return max(answer["first_copy_seconds"] for answer in answers)


def _prompt_note(given: Any, answers: Sequence[Mapping[str, Any]], share: float) -> str:
    slowest = [max(pair) for pair in zip(*(a["seconds"] for a in answers), strict=True)]
    return (
        f"A prompt of {given.prompt_length} x {given.d_model} with the state of AdamW and the best "
        f"prompt so far ({answers[0]['bytes']:,} bytes), 2 ranks: {1000 * median(slowest):.0f} ms "
        f"a save (at most {1000 * max(slowest):.0f}), {share:.2f} % of {_STEPS_OF_A_SAVE} steps of "
        f"{given.step_seconds:g} s."
    )


if __name__ == "__main__":
    main()
