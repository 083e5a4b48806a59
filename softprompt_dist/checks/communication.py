"""Whether the ranks meet, and how fast they move what a step moves: all-reduce and all-gather.

Run as a module on every rank it writes its findings to the file that it is given, on rank 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from softprompt_dist.backbone.cell import Cluster
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.preflight import check_devices
from softprompt_dist.durable import replace_file
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.groups import cpu_group_problem
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.planning.machine import Machine, gpu_of_device

_BYTES_ON_CPU, _BYTES_ON_GPU = 8 * 2**20, 400 * 2**20
"""Of the tensor whose speed is measured: a large prompt's gradient; a block of an 11B model."""
_SLOW_ON_CPU = 0.1e9
_SLOW_SHARE = 0.5
"""Of the speed that `softprompt plan` counts on."""
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


@dataclass(frozen=True)
class Speed:
    """Of one collective, as one rank measured it."""

    num_ranks: int
    payload: int
    """Bytes of the whole tensor."""
    received: float
    """Bytes a second that reach each rank."""
    seconds: float
    latency: float
    """Seconds for one number."""


def expected_bytes_per_second(device_name: str, num_nodes: int) -> float | None:
    """What `softprompt plan` lets a rank receive; None where it knows nothing of such devices."""
    gpu = gpu_of_device(device_name)
    if gpu is None:
        return None
    machine = Machine(gpu, Cluster(1, num_nodes))
    return machine.reduce_gb_per_second * 1e9


def judge_speed(name: str, speed: Speed, expected: float | None) -> Finding:
    """Whether a collective is as fast as a run needs it.

    Args:
        name: of the collective.
        speed: as it was measured.
        expected: bytes a second that a rank should receive; None: no GPU that is known.
    """
    found = (
        f"{speed.num_ranks} ranks: {speed.payload / 2**20:.0f} MiB in {speed.seconds * 1e3:.1f} ms,"
        f" {speed.received / 1e9:.2f} GB/s to each rank, latency {speed.latency * 1e6:.0f} us"
    )
    if expected is not None:
        found += f"; `softprompt plan` counts on {expected / 1e9:.0f} GB/s"
    slow = _SLOW_ON_CPU if expected is None else _SLOW_SHARE * expected
    if speed.received >= slow:
        return Finding(name, "ok", found)
    remedy = (
        "Slow: other programs hold the cores, or the network is not the fast one (name it with "
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says which one NCCL takes). A "
        "sharded backbone moves all its weights twice a step; hold it replicated if it fits, or "
        "plan with --link-gb-per-second and --network-gb-per-second."
    )
    return Finding(name, "warn", found, remedy)


def _try_collectives() -> list[Finding]:
    """All ranks: one finding for each collective."""
    num_ranks = ranks.world_size()
    if num_ranks == 1:
        return [Finding("communication", "ok", "1 rank: nothing to move; try --ranks 2")]
    payload = _BYTES_ON_GPU if ranks.device().type == "cuda" else _BYTES_ON_CPU
    share = payload * (num_ranks - 1) / num_ranks  # what a rank lacks of the whole
    num_nodes = len(set(ranks.gather_objects(socket.gethostname())))
    expected = expected_bytes_per_second(ranks.device_name(), num_nodes)

    def tried(
        name: str, move: Callable[[Tensor], object], size: int, moved: float, is_right: bool
    ) -> Finding:
        latency = _seconds(move, 1, _LATENCY_REPETITIONS)
        seconds = _seconds(move, size, _REPETITIONS)  # on every rank, also where values are wrong
        speed = Speed(num_ranks, payload, moved / seconds, seconds, latency)
        return judge_speed(name, speed, expected) if is_right else _wrong(name)

    size = payload // 4
    return [
        # Each number is received once to be summed, and once as a sum.
        tried("all-reduce", ranks.all_reduce_sum, size, 2 * share, _sum_is_right()),
        tried("all-gather", _all_gather, size // num_ranks, share, _gathered_are_right()),
        _background_saves(),
    ]


def _wrong(name: str) -> Finding:
    remedy = "The ranks' communication is broken: compare the nodes' drivers and libraries."
    return Finding(name, "fail", "wrong values", remedy)


def _background_saves() -> Finding:
    problem = cpu_group_problem()
    if not problem:
        return Finding("gloo", "ok", "adaptations can save in the background")
    remedy = (
        "Adaptations will wait for each checkpoint. Name an interface that all hosts reach with "
        "GLOO_SOCKET_IFNAME."
    )
    return Finding("gloo", "warn", problem, remedy)


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
