"""The tuning benchmark's numbers: medians over steps, ratios, aims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.clock import PHASES
from benchmarks.report import GB, Aim

PEER = "PEFT + Trainer + ZeRO-3"
PEER_SCALED = "the same, live window as for XXL"
OURS_ZERO3, OURS_INT8, OURS_REPLICATED = "ours zero3", "ours zero3 int8", "ours replicated"
_AIMED_RATIO = {"real": 1.5, "fixed": 1.1}
Summary = dict[str, Any]


def summarise(answers: Sequence[Mapping[str, Any]]) -> Summary:
    """One variant's ranks in a few numbers: seconds and bytes of a step, memory of the worst rank.

    `loop_share`: what of a step is not the slowest rank's forward and backward (gathers included).
    """
    steps = list(zip(*(answer["steps"] for answer in answers), strict=True))
    walls = [max(step["wall"] for step in of_ranks) for of_ranks in steps]
    phases = {
        phase: mean(step.get(phase, 0.0) for of_ranks in steps for step in of_ranks)
        for phase in PHASES
    }
    beside = [
        wall - max(_backbone_seconds(step) for step in of_ranks)
        for wall, of_ranks in zip(walls, steps, strict=True)
    ]
    return {
        "wall": mean(walls),
        "examples_per_second": answers[0]["global_batch_size"] / mean(walls),
        "phases": phases,
        "loop_share": median(b / w for b, w in zip(beside, walls, strict=True)),
        "flops": mean(sum(step["flops"] for step in of_ranks) for of_ranks in steps),
        "gather_bytes": mean(s.get("gather_bytes", 0.0) for r in steps for s in r),
        "reduce_bytes": mean(s.get("reduce_bytes", 0.0) for r in steps for s in r),
        "calls": mean(step.get("calls", 0.0) for of_ranks in steps for step in of_ranks),
        "peak_rss_bytes": max(answer["peak_rss_bytes"] for answer in answers),
        "peak_anonymous_bytes": max(answer["peak_anonymous_bytes"] for answer in answers),
        "losses": answers[0]["losses"],
    }


def row(name: str, summary: Summary, peer: Summary | None, peak_flops: float) -> dict[str, str]:
    """A line of the table; times are seconds of an average step, averaged over the ranks."""
    ratio = summary["examples_per_second"] / peer["examples_per_second"] if peer else None
    phases = {
        {"reduce": "all-reduce"}.get(phase, phase): f"{seconds:.2f}"
        for phase, seconds in summary["phases"].items()
    }
    return {
        "path, lengths": name,
        "examples/s": f"{summary['examples_per_second']:.2f}",
        "over PEFT": f"{ratio:.2f}x" if ratio else "",
        "step, s": f"{summary['wall']:.2f}",
        **phases,
        "loop": f"{summary['loop_share']:.1%}",
        "of matmul peak": f"{summary['flops'] / summary['wall'] / peak_flops:.0%}",
        "peak RSS, GB": f"{summary['peak_rss_bytes'] / GB:.2f}",
        "gathered, MB/step": f"{summary['gather_bytes'] / 1e6:.1f}",
        "reduced, MB/step": f"{summary['reduce_bytes'] / 1e6:.2f}",
        "collectives/step": f"{summary['calls']:.0f}",
    }


def aims(summaries: Mapping[str, Summary], lengths: str, peak_flops: float) -> list[Aim]:
    """Those that can be judged of the variants that ran."""
    found = []
    peer, ours, replicated = (summaries.get(n) for n in (PEER, OURS_ZERO3, OURS_REPLICATED))
    if peer and ours:
        ratio = ours["examples_per_second"] / peer["examples_per_second"]
        limit = _AIMED_RATIO[lengths]
        found.append(Aim(f"examples/s, {OURS_ZERO3} over PEFT, {lengths}", ratio, limit, True))
    for name in (OURS_ZERO3, OURS_REPLICATED):
        if name in summaries:
            share = 100 * summaries[name]["loop_share"]
            found.append(Aim(f"loop beside the backbone, {name}, {lengths}, %", share, 3.0))
    if replicated:
        share = 100 * replicated["flops"] / replicated["wall"] / peak_flops
        found.append(Aim(f"of matmul peak, {OURS_REPLICATED}, {lengths}, %", share, 70.0, True))
    return found


def loss_note(summaries: Mapping[str, Summary], lengths: str) -> list[str]:
    """The first and the last loss of every variant: the same work gives the same numbers."""
    words = [f"{n} {s['losses'][0]:.4f} -> {s['losses'][-1]:.4f}" for n, s in summaries.items()]
    return [f"Loss of the first and the last step, {lengths}: " + "; ".join(words) + ".", ""]


def _backbone_seconds(step: Mapping[str, float]) -> float:
    return sum(step.get(phase, 0.0) for phase in ("gather", "forward", "backward"))
