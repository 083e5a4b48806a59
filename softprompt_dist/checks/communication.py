"""Whether the ranks meet, and how fast they move what a step moves: all-reduce and all-gather.

Run as a module on every rank it writes its findings to the file that it is given, on rank 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.preflight import check_devices
from softprompt_dist.durable import replace_file
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb

PAYLOAD_BYTES = 8 * 2**20
"""Of the tensor whose speed is measured: a large prompt's gradient, a small block's weights."""

_SLOW = 0.1e9
_REPETITIONS = 5
_LATENCY_REPETITIONS = 20
_RANK_ZERO_FIRST_SECONDS = 30.0


def check_communication(*, debug: bool) -> list[Finding]:
    """All ranks: join, try both collectives for right values and for speed.

    Returns:
        The same findings on every rank; one that failed on any rank failed.

    Raises:
        SoftpromptError: this rank could not join, or lost the others.
    """
    try:
        join_world(debug=debug)
        found = ranks.gather_objects(_try_collectives())
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise MachineError(
            f"{first_line} Check that no rank has ended, and what each of them said."
        ) from error
    return [_worst(of_one_check) for of_one_check in zip(*found, strict=True)]


@contextmanager
def answer_within(seconds: float) -> Iterator[None]:
    """End this process with one message if the work inside has not ended after `seconds`."""
    late = 0.0 if ranks.is_main() else _RANK_ZERO_FIRST_SECONDS
    timer = threading.Timer(seconds + late, _give_up, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def unanswered(seconds: float) -> str:
    """What to do when the ranks have not ended after `seconds`."""
    return (
        f"The ranks did not answer within {seconds:.0f} s. Check that all of them were started and "
        "can reach each other (MASTER_ADDR, firewall, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME), "
        "or wait longer with --timeout."
    )


def _give_up(seconds: float) -> None:
    print(f"error: {unanswered(seconds)}", file=sys.stderr, flush=True)
    os._exit(1)


def _try_collectives() -> list[Finding]:
    """All ranks: one finding for each collective."""
    if ranks.world_size() == 1:
        return [Finding("communication", "ok", "1 rank: nothing to move; try --ranks 2")]
    size = PAYLOAD_BYTES // 4
    return [
        _tried("all-reduce", ranks.all_reduce_sum, size, _sum_is_right()),
        _tried("all-gather", _all_gather, size // ranks.world_size(), _gathered_are_right()),
    ]


def _tried(name: str, move: Callable[[Tensor], object], size: int, right: bool) -> Finding:
    """All ranks: latency with one number, bandwidth with `size` numbers of each rank."""
    if not right:
        remedy = "The ranks' communication is broken: compare the nodes' drivers and libraries."
        return Finding(name, "fail", "wrong values", remedy)
    latency = _seconds(move, 1, _LATENCY_REPETITIONS)
    seconds = _seconds(move, size, _REPETITIONS)
    found = (
        f"{ranks.world_size()} ranks: {PAYLOAD_BYTES / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms = "
        f"{PAYLOAD_BYTES / seconds / 1e9:.2f} GB/s, latency {latency * 1e6:.0f} us"
    )
    if PAYLOAD_BYTES / seconds < _SLOW:
        remedy = (
            "Slow: other programs hold the cores, or the network is not the fast one (name it with "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME). A sharded backbone moves all its weights "
            "twice a step; hold it replicated if it fits."
        )
        return Finding(name, "warn", found, remedy)
    return Finding(name, "ok", found)


def _seconds(move: Callable[[Tensor], object], size: int, repetitions: int) -> float:
    tensor = torch.zeros(size, device=ranks.device())
    move(tensor)  # the first call also opens connections
    taken = []
    for _ in range(repetitions):
        dist.barrier()
        start = time.perf_counter()
        move(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _all_gather(tensor: Tensor) -> Tensor:
    gathered = tensor.new_empty(ranks.world_size() * tensor.numel())
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered


def _sum_is_right() -> bool:
    total = ranks.all_reduce_sum(torch.full([3], ranks.rank() + 1.0, device=ranks.device()))
    return bool((total == ranks.world_size() * (ranks.world_size() + 1) / 2).all())


def _gathered_are_right() -> bool:
    gathered = _all_gather(torch.full([1], float(ranks.rank()), device=ranks.device()))
    return gathered.tolist() == list(range(ranks.world_size()))


def _worst(findings: Sequence[Finding]) -> Finding:
    order = {"ok": 0, "warn": 1, "fail": 2}
    return max(findings, key=lambda finding: order[finding.status])


def main(argv: Sequence[str] | None = None) -> None:
    """One rank of those that `local_ranks` starts."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("findings", type=Path)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(argv)
    with answer_within(options.timeout):
        findings = check_communication(debug=options.debug)
        findings += check_devices(options.findings.parent)
        if ranks.is_main():
            written = json.dumps([dataclasses.asdict(finding) for finding in findings])
            replace_file(options.findings, written.encode())
        leave_world()


if __name__ == "__main__":
    run_verb(main)
