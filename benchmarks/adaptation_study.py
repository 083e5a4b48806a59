"""What LM adaptation does for prompt tuning, in small: the paper's figures 3c and 3d.

    python -m benchmarks.adaptation_study --out runs/study --jobs 2

For each size and seed a T5 v1.1 is trained from nothing by span corruption and then adapted (recipe
`tiny-t5`), and a prompt is tuned on the same task for the model as it is after no adaptation, the
same with a sentinel before every target, and after 10, 50 and 100 % of the adaptation. Answers are
generated, as in the paper. Every part that is done is skipped: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table
from softprompt_dist.errors import MachineError

SIZES = {
    "nano": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 160,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
    },
    "mini": {"d_model": 96, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2},
    "tiny": {},
}
"""Name -> what differs from the architecture of the recipe."""
SENTINEL = "<extra_id_0>"
PROMPT_LENGTH = 100
BATCH_SIZE = 32
"""Of the recipe `demo-t5`."""
_LAST_UPDATES = 50
_COLORS = ("#3f8f4f", "#1f5fa8", "#d1600a")


@dataclass(frozen=True)
class Condition:
    """A model that a prompt is tuned for, and how its targets look."""

    name: str
    share: int
    """Percent of the adaptation's steps that it had."""
    target_prefix: str | None = None


CONDITIONS = (
    Condition("span corruption", 0),
    Condition("span corruption + sentinel", 0, SENTINEL),
    Condition("LM-adapted 10 %", 10),
    Condition("LM-adapted 50 %", 50),
    Condition("LM-adapted 100 %", 100),
)


@dataclass(frozen=True)
class Member:
    """A model of the family, from nothing to fully adapted."""

    size: str
    seed: int
    folder: Path

    def adapt(self) -> None:
        """Both stages; goes on where it was."""
        overrides = [f"seed={self.seed}"]
        overrides += [
            f"stages.span.architecture.{key}={value}" for key, value in SIZES[self.size].items()
        ]
        _run("adapt", "tiny-t5", self.folder, overrides)

    def tune(self, condition: Condition, steps: int) -> None:
        """A prompt for the model of `condition`; goes on where it was."""
        overrides = [
            f"seed={self.seed}",
            f"steps={steps}",
            f"backbone.path={self.backbone(condition)}",
            f"prompt.prompt_length={PROMPT_LENGTH}",
            "backbone.sharding=replicated",
            "evaluation.method=greedy",
        ]
        if condition.target_prefix:
            overrides.append(f"task.target_prefix={condition.target_prefix}")
        folder = self.tuned(condition)
        if not (folder / "results.json").is_file():
            _run("train", "demo-t5", folder, overrides)

    def tuned(self, condition: Condition) -> Path:
        """Run directory of the prompt."""
        name = "".join(c if c.isalnum() else "-" for c in condition.name.replace(" %", ""))
        return self.folder / "tuned" / name

    def backbone(self, condition: Condition) -> Path:
        """The export that `condition` is of."""
        if condition.share == 0:
            return self.folder / "span" / "export"
        if condition.share == 100:
            return self.folder / "lm" / "export"
        return self.folder / "lm" / f"export-step-{self.step(condition.share):08d}"

    def step(self, share: int) -> int:
        """Of the adaptation, at a share of it."""
        stage = json.loads((self.folder / "lm" / "export" / "adaptation.json").read_text())[-1]
        return int(stage["steps"]) * share // 100

    def measures(self, share: int) -> dict[str, float]:
        """What the adaptation measured on its validation text at a share of its steps."""
        return next(v for s, v in self.course() if s == self.step(share))

    def course(self) -> list[tuple[int, dict[str, float]]]:
        """Step and measures, over the adaptation."""
        lines = (self.folder / "lm" / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [(e["step"], e) for e in entries if e["kind"] == "validation"]

    def training_loss(self, condition: Condition) -> float:
        """Cross-entropy in nats per example, end-of-sequence included, of the last updates."""
        lines = (self.tuned(condition) / "metrics.jsonl").read_text().splitlines()
        updates = [entry for line in lines if (entry := json.loads(line))["kind"] == "train"]
        last = updates[-_LAST_UPDATES:]
        return sum(e["cross_entropy"] * e["num_tokens"] for e in last) / len(last) / BATCH_SIZE

    def result(self, condition: Condition) -> dict[str, Any]:
        """results.json of the tuned prompt."""
        found: dict[str, Any] = json.loads((self.tuned(condition) / "results.json").read_text())
        return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write table.md, study.json and study.png."""
    options = _parser().parse_args(argv)
    members = [
        Member(size, seed, options.out / f"{size}-{seed}")
        for size in options.sizes
        for seed in options.seeds
    ]

    def work(member: Member) -> None:
        member.adapt()
        for condition in CONDITIONS:
            member.tune(condition, options.tuning_steps)
        print(f"done: {member.folder}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, members))
    rows = list(summary(members))
    text = "\n".join(markdown_table(rows))
    (options.out / "table.md").write_text(text + "\n")
    (options.out / "study.json").write_text(json.dumps(_raw(members), indent=1) + "\n")
    _plot(members, options.out / "study.png")
    print(text)


def summary(members: Sequence[Member]) -> Iterator[dict[str, str]]:
    """A row for each size and condition: mean and standard deviation over the seeds."""
    for size in dict.fromkeys(member.size for member in members):
        own = [member for member in members if member.size == size]
        for condition in CONDITIONS:
            results = [member.result(condition) for member in own]
            measures = [member.measures(condition.share) for member in own]
            invalid = [100 * r["num_invalid"] / r["num_answers"] for r in results]
            yield {
                "size": size,
                "frozen model": condition.name,
                "prefix-LM NLL": _spread([m["prefix_lm_nll"] for m in measures], 3),
                "sentinel leak, %": _spread([m["sentinel_leak"] for m in measures], 1),
                "tuning loss, nats": _spread([m.training_loss(condition) for m in own], 2),
                "test accuracy": _spread([r["score"] for r in results], 1),
                "no label, %": _spread(invalid, 1),
                "seeds": str(len(own)),
            }


def _raw(members: Sequence[Member]) -> list[dict[str, Any]]:
    return [
        {
            "size": member.size,
            "seed": member.seed,
            "condition": condition.name,
            "score": member.result(condition)["score"],
            "tuning_loss": member.training_loss(condition),
            "num_invalid": member.result(condition)["num_invalid"],
            "num_answers": member.result(condition)["num_answers"],
            **{k: member.measures(condition.share)[k] for k in ("prefix_lm_nll", "sentinel_leak")},
        }
        for member in members
        for condition in CONDITIONS
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _run(verb: str, recipe: str, folder: Path, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", f"softprompt_dist.{verb}", "--recipe", recipe]
    command += ["--run-dir", str(folder)]
    for override in overrides:
        command += ["--set", override]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with (folder / "output.log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code:
        raise MachineError(f"{' '.join(command)} ended with {code}; see {folder / 'output.log'}.")


def _plot(members: Sequence[Member], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    titles = {
        "prefix_lm_nll": ("Prefix LM", "nats per target token"),
        "sentinel_leak": ("Continuations that begin with a sentinel", "% of validation prefixes"),
    }
    colors = dict(
        zip(dict.fromkeys(m.size for m in members), ("#3f8f4f", "#1f5fa8", "#d1600a"), strict=False)
    )
    for axis, (key, (title, unit)) in zip(axes, titles.items(), strict=False):
        for member in members:
            steps, values = zip(*((s, e[key]) for s, e in member.course()), strict=True)
            label = member.size if member.seed == members[0].seed else None
            axis.plot(steps, values, color=colors[member.size], alpha=0.7, label=label)
        axis.set(title=title, ylabel=unit, xlabel="steps of LM adaptation")
        axis.legend()
    _plot_scores(axes[2], members, colors)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_scores(axis: Any, members: Sequence[Member], colors: dict[str, str]) -> None:
    for number, (size, color) in enumerate(colors.items()):
        own = [member for member in members if member.size == size]
        for place, condition in enumerate(CONDITIONS):
            scores = [member.result(condition)["score"] for member in own]
            at = place + 0.26 * (number - (len(colors) - 1) / 2)
            axis.bar(at, statistics.mean(scores), 0.24, color=color, alpha=0.5)
            axis.plot([at] * len(scores), scores, "o", color=color, markersize=4)
    names = ["span\ncorruption", "span +\nsentinel", "LM\n10 %", "LM\n50 %", "LM\n100 %"]
    axis.set_xticks(range(len(CONDITIONS)), names)
    axis.set(title="Prompt tuned on each; dots are seeds", ylabel="test score, %", ylim=(0, 100))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation_study")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tuning-steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one core each")
    return parser


if __name__ == "__main__":
    main()
