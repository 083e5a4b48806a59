"""The adaptation benchmark's numbers: medians over the steps of all rounds, ratios, aims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.report import GB, Aim

PEER, PEER_MAX = "HF Trainer, padded to the longest", "HF Trainer, padded to the maximum"
OURS, OURS_PAIRS = "ours, greedy packing", "ours, complementary pairs"
PEER_SPANS, OURS_SPANS = "HF Trainer, full rows", "ours, full rows"
_PEER_OF = {PEER: PEER, PEER_MAX: PEER, OURS: PEER, OURS_PAIRS: PEER}
_PEER_OF |= {PEER_SPANS: PEER_SPANS, OURS_SPANS: PEER_SPANS}
Rounds = dict[str, list[list[dict[str, Any]]]]
"""Variant -> of each round, what each rank measured."""
Summaries = dict[str, dict[str, Any]]


def summarise(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """One variant in a few numbers, of all ranks together."""
    steps = [of_ranks for answers in rounds for of_ranks in _steps(answers)]
    return {
        "seconds": median(max(step["wall"] for step in of_ranks) for of_ranks in steps),
        "tokens_per_second": median(_rate(of_ranks, "real_tokens") for of_ranks in steps),
        "positions_per_second": median(_rate(of_ranks, "positions") for of_ranks in steps),
        "flops_per_second": median(_rate(of_ranks, "flops") for of_ranks in steps),
        "tokens_per_cpu_second": median(_sum(s, "real_tokens") / _sum(s, "cpu") for s in steps),
        "padding": 1.0 - mean(_sum(s, "real_tokens") / _sum(s, "positions") for s in steps),
        "peak_rss_bytes": max(a["peak_rss_bytes"] for answers in rounds for a in answers),
        "losses": rounds[0][0]["losses"],
    }


def row(name: str, summaries: Summaries, peak_flops: float) -> dict[str, str]:
    """A line of the table."""
    own = summaries[name]
    ratio = _ratio(summaries, name, "tokens_per_second")
    by_cpu = _ratio(summaries, name, "tokens_per_cpu_second")
    return {
        "path": name,
        "real tokens/s": f"{own['tokens_per_second']:,.0f}",
        "over HF": f"{ratio:.2f}x" if ratio else "",
        "by CPU time": f"{by_cpu:.2f}x" if by_cpu else "",
        "positions/s": f"{own['positions_per_second']:,.0f}",
        "padding": f"{own['padding']:.1%}",
        "of matmul peak": f"{own['flops_per_second'] / peak_flops:.0%}",
        "step, s": f"{own['seconds']:.2f}",
        "peak RSS, GB": f"{own['peak_rss_bytes'] / GB:.2f}",
    }


def aims(summaries: Summaries, peak_flops: float) -> list[Aim]:
    """Those that can be judged of the variants that ran."""
    found = []
    for name in (OURS, OURS_PAIRS):
        if ratio := _ratio(summaries, name, "tokens_per_second"):
            found.append(Aim(f"real tokens/s over HF, documents, {name}", ratio, 1.3, True))
    if ratio := _ratio(summaries, OURS_SPANS, "positions_per_second"):
        found.append(Aim("positions/s over HF, full rows of spans", ratio, 1.0, True))
    for name in (OURS, OURS_PAIRS, OURS_SPANS):
        if name in summaries:
            share = 100 * summaries[name]["flops_per_second"] / peak_flops
            found.append(Aim(f"of matmul peak, {name}, %", share, 60.0, True))
    return found


def pipeline_aim(name: str, tokens_per_second: float, summary: Mapping[str, Any]) -> Aim:
    """What one core makes over what all ranks' models read."""
    ratio = tokens_per_second / summary["tokens_per_second"]
    what = f"rows made by one core, {tokens_per_second:,.0f} real tokens/s, over read, {name}"
    return Aim(what, ratio, 10.0, True)


def notes(summaries: Summaries, peak_flops: float) -> list[str]:
    """Losses, which the same rows make equal, and the peak."""
    words = "; ".join(f"{n} {s['losses'][0]:.4f}" for n, s in summaries.items())
    return [
        "Tokens and positions are those of encoder and decoder. Medians over all rounds' steps. By "
        "CPU time: the same ratio of tokens per second that the ranks computed, which other jobs "
        "on the machine change less.",
        "",
        f"Cross-entropy of the first step: {words}.",
        "",
        f"Matmul peak of the ranks together: {peak_flops / 1e9:.0f} GFLOP/s.",
    ]


def _steps(answers: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, float], ...]]:
    return list(zip(*(answer["steps"] for answer in answers), strict=True))


def _rate(of_ranks: Sequence[Mapping[str, float]], count: str) -> float:
    return _sum(of_ranks, count) / max(step["wall"] for step in of_ranks)


def _sum(of_ranks: Sequence[Mapping[str, float]], count: str) -> float:
    return sum(step[count] for step in of_ranks)


def _ratio(summaries: Summaries, name: str, rate: str) -> float | None:
    peer = _PEER_OF[name]
    if name not in summaries or peer not in summaries:
        return None
    return float(summaries[name][rate] / summaries[peer][rate])
