"""What the ranks tell each other before they form a group, when they can still differ.

They write into the rendezvous store, which does not depend on the backend: a rank without a GPU
among ranks with one would wait in gloo, and they in NCCL. Rank 0 judges, and all hear it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import psutil

from softprompt_dist.errors import MachineError

_OF_A_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
"""Launchers give one of them to each process that they start, and do not have it themselves."""
_KEYS = "softprompt/meeting"
_UNTIL_HEARD = timedelta(seconds=5)
"""Rank 0 may hold the store: it does not end before the others have read why."""


@dataclass(frozen=True)
class Newcomer:
    """What a rank says of itself."""

    rank: int
    backend: str
    job: str
    """See `job_nonce`."""
    problem: str = ""
    """Why it cannot take part."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


def agree(store: Any, mine: Newcomer, world_size: int) -> None:
    """All ranks: be of one job, able to take part and of one backend, or refuse together.

    Args:
        store: of the rendezvous, a `torch.distributed.Store`.
        mine: this rank.
        world_size: how many there must be.

    Raises:
        MachineError: on all ranks; with the ranks and hosts that differ.
    """
    if store.add(f"{_KEYS}/claims/{mine.rank}", 1) > 1:
        claimed = f"another process is rank {mine.rank} already"
        mine = replace(mine, problem=_different_jobs(claimed))
    store.set(f"{_KEYS}/{mine.rank}", json.dumps(asdict(mine)))
    if mine.rank == 0:
        keys = [f"{_KEYS}/{rank}" for rank in range(world_size)]
        store.wait(keys)
        said = [Newcomer(**json.loads(value)) for value in store.multi_get(keys)]
        store.set(f"{_KEYS}/verdict", json.dumps(_judge(said)))
    verdict = json.loads(store.get(f"{_KEYS}/verdict")) or _of_one(mine)
    if store.add(f"{_KEYS}/heard", 1) == world_size:
        store.set(f"{_KEYS}/all heard", "yes")
    if not verdict:
        return
    if mine.rank == 0:
        with suppress(RuntimeError):
            store.wait([f"{_KEYS}/all heard"], _UNTIL_HEARD)
    error = MachineError(verdict)
    error.on_all_ranks = True
    raise error


def job_nonce(environ: Mapping[str, str]) -> str:
    """A string that all ranks of one job share and no other job has; empty where nothing tells."""
    if environ.get("SOFTPROMPT_RUN_ID"):
        return environ["SOFTPROMPT_RUN_ID"]
    if environ.get("SLURM_JOB_ID"):
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return "slurm " + ".".join(environ.get(name, "0") for name in names)
    launched = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE")
    if launched and launched == environ.get("WORLD_SIZE"):
        return _launcher()
    return ""


def _launcher() -> str:
    """The nearest ancestor that is no rank; a profiler or a shell around one still is.

    Empty where a wrapper has cut the rank off from it, as profilers do with a daemon.
    """
    try:
        for ancestor in psutil.Process().parents():
            if ancestor.pid > 1 and not any(name in ancestor.environ() for name in _OF_A_RANK):
                return f"launcher {ancestor.pid} on {socket.gethostname()}"
    except psutil.Error:  # another user's process, or one that has ended
        pass
    return ""


def _judge(said: Sequence[Newcomer]) -> str:
    """Why these ranks cannot work together; empty if they can."""
    jobs = list(dict.fromkeys(newcomer.job for newcomer in said if newcomer.job))
    if len(jobs) > 1:
        return _different_jobs("; ".join(jobs))
    problems = [_of_one(newcomer) for newcomer in said if newcomer.problem]
    if problems:
        return problems[0]
    if len({newcomer.backend for newcomer in said}) > 1:
        return (
            f"All ranks must compute on one kind of device, but {', and '.join(_by_backend(said))}."
            " Check on those hosts the driver (nvidia-smi) and PyTorch's build, or set "
            "DS_ACCELERATOR=cpu for all ranks."
        )
    return ""


def _of_one(newcomer: Newcomer) -> str:
    if not newcomer.problem:
        return ""
    return f"Rank {newcomer.rank} on {newcomer.host}: {newcomer.problem}"


def _by_backend(said: Sequence[Newcomer]) -> Iterator[str]:
    for backend in sorted({newcomer.backend for newcomer in said}):
        of_it = [newcomer for newcomer in said if newcomer.backend == backend]
        numbers = ", ".join(str(newcomer.rank) for newcomer in of_it)
        hosts = ", ".join(sorted({newcomer.host for newcomer in of_it}))
        device = "GPUs (nccl)" if backend == "nccl" else "the CPU (gloo)"
        yield f"rank {numbers} on {hosts} would use {device}"


def _different_jobs(evidence: str) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"Ranks of different jobs met at {place} ({evidence}), and would train on each other's "
        "gradients. Give each job a port of its own (deepspeed --master_port N, or MASTER_PORT). "
        "If they are one job whose ranks were started apart, set SOFTPROMPT_RUN_ID to the same "
        "word for each of them."
    )
