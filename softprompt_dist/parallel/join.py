"""Joining the world of ranks, whoever started them: `deepspeed`, srun, torchrun, or nobody.

A world needs no DeepSpeed, only `torch.distributed`; see `deepspeed_start` for what does.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from softprompt_dist.errors import HangError, MachineError
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.parallel.meeting import Newcomer, agree, job_nonce
from softprompt_dist.progress import phase

DEEPSPEED_LOGGER = "DeepSpeed"
_LONGEST_LEAVING = 600.0
"""Seconds; the ranks have done all together until now, and end within moments."""
_ON_LEAVING: list[Callable[[], None]] = []
_MEETING = "Check that all ranks were started, and that MASTER_ADDR can be reached from every node."
_LIMIT = "health.slow_timeout_seconds"
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_world(*, debug: bool = False, limit_seconds: float | None = None) -> None:
    """All ranks: become one of them. A process that nobody launched joins a world of one.

    Args:
        debug: let libraries say what no user can act on.
        limit_seconds: after which a rank that still waits for the others ends its process; None:
            two hours.

    Raises:
        MachineError: the launcher's variables are incomplete or wrong; on all ranks, if one of them
            has no GPU of its own, or another kind of device; the port is taken, or two jobs met on
            one port.
    """
    if dist.is_initialized():
        return
    fill_rank_variables(os.environ)
    check_rank_variables(os.environ)
    set_threads(os.environ)
    if not debug:
        _hush_libraries()
    limit = ranks.LONGEST_WAIT.total_seconds() if limit_seconds is None else limit_seconds
    longer = ranks.let_groups_wait(limit)
    late = f"Rank {ranks.rank()} has waited {limit:g} s for the others at {_place()}. {_MEETING}"
    giving_up = f"{late} If they are slow, raise {_LIMIT}."
    with phase("meeting the other ranks"), stop.ends_while_waiting(limit, giving_up):
        _meet(longer)
    stop.end_here_if_asked("the ranks met")


def choose_backend() -> str:
    """`nccl` or `gloo`; this process computes on its GPU or on the CPU from now on.

    Raises:
        MachineError: there is no GPU for this rank, and nobody asked for the CPU.
    """
    problem = ranks.unusable_gpus()
    if problem:
        raise MachineError(problem)
    if ranks.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return "gloo"
    check_gpus(torch.cuda.device_count(), os.environ)
    torch.cuda.set_device(ranks.device())
    # Where Slurm shows each task one GPU only, DeepSpeed must not look for the others.
    os.environ["LOCAL_RANK"] = str(ranks.device().index)
    return "nccl"


def _meet(timeout: timedelta) -> None:
    """All ranks: the process group, once they have agreed that they can have one."""
    backend, problem = "", ""
    try:
        backend = choose_backend()
    except MachineError as error:
        if ranks.world_size() == 1:
            raise
        problem = str(error)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        if world_size > 1:
            mine = Newcomer(rank, backend, job_nonce(os.environ), problem)
            agree(store, mine, world_size)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            # So that NCCL connects now; one rank has nobody to connect to.
            device_id=ranks.device() if backend == "nccl" and world_size > 1 else None,
        )
    except (RuntimeError, OSError) as error:
        raise MachineError(_explain(error)) from error


def leave_world(limit_seconds: float = _LONGEST_LEAVING) -> None:
    """All ranks: close the process group, if there is one.

    A rank that still waits for the others after `limit_seconds` ends its process.
    """
    if dist.is_initialized():
        late = HangError(
            f"Rank {ranks.rank()} has waited {limit_seconds:g} s for the other ranks to end. Its "
            "own work is done; look at what they said last."
        )
        watch = threading.Timer(limit_seconds, stop.end_hung, [late])
        watch.daemon = True
        watch.start()
        try:
            dist.barrier()  # a rank that leaves early takes the rendezvous store with it
        finally:
            watch.cancel()
        dist.destroy_process_group()
    while _ON_LEAVING:
        _ON_LEAVING.pop()()
    stop.forget()


def on_leaving(clean_up: Callable[[], None]) -> None:
    """Have `leave_world` call `clean_up` on this rank."""
    _ON_LEAVING.append(clean_up)


def fill_rank_variables(environ: MutableMapping[str, str]) -> None:
    """Set RANK and its siblings from Slurm's variables, or to a world of one if nobody set any.

    Raises:
        MachineError: a batch script of several tasks started us without srun.
    """
    if "RANK" in environ or int(environ.get("WORLD_SIZE") or "1") > 1:
        return
    if "SLURM_PROCID" in environ and (environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID")):
        _fill_from_slurm(environ)
        return
    if int(environ.get("SLURM_NTASKS") or "1") > 1 and "SLURM_PROCID" in environ:
        raise MachineError(
            f"Slurm gave this job {environ['SLURM_NTASKS']} tasks, but only one was started: each "
            "rank must be a task of its own. Start with srun, as slurm/train_xxl.sh does."
        )
    # Port 0: the system picks a free one, and a world of one needs to tell nobody.
    lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environ.update(lone, MASTER_PORT="0")


def _fill_from_slurm(environ: MutableMapping[str, str]) -> None:
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ["WORLD_SIZE"] = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    one_node = environ.get("SLURM_STEP_NUM_NODES") == "1" or not nodes
    environ.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else first_host(nodes))
    environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000))


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,12],login1` -> `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodelist)


def check_rank_variables(environ: Mapping[str, str]) -> None:
    """Refuse a half-set environment before it becomes a hang.

    Raises:
        MachineError: a variable is missing, not a number, or out of range.
    """
    remedy = "Start with `deepspeed --num_gpus N -m softprompt_dist.train`, srun or torchrun."
    missing = [name for name in _RANK_VARIABLES if not environ.get(name)]
    if missing:
        given = [f"{name}={environ[name]}" for name in _RANK_VARIABLES if environ.get(name)]
        raise MachineError(
            f"Found {', '.join(given) or 'nothing'} without {', '.join(missing)}; "
            f"a launcher sets all of them. {remedy}"
        )
    numbers = {name: environ[name] for name in _RANK_VARIABLES if name != "MASTER_ADDR"}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]
    if wrong:
        raise MachineError(f"{', '.join(wrong)} must be a whole number. {remedy}")
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if rank >= world_size:
        raise MachineError(f"RANK={rank} must be below WORLD_SIZE={world_size}. {remedy}")


def check_gpus(num_gpus: int, environ: Mapping[str, str]) -> None:
    """Refuse more ranks on a node than it has GPUs, unless each rank was shown one of its own.

    Raises:
        MachineError: with the two numbers.
    """
    num_ranks = local_world_size(environ)
    # Slurm's --gpus-per-task shows each task one GPU only.
    under_slurm = "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    own_gpu_each = num_gpus == 1 and under_slurm
    if num_ranks > num_gpus and not own_gpu_each:
        raise MachineError(
            f"{num_ranks} ranks were started on this node, which has {num_gpus} GPU(s); each rank "
            f"needs one. Start with --num_gpus {num_gpus}, or set DS_ACCELERATOR=cpu."
        )


def local_world_size(environ: Mapping[str, str]) -> int:
    """Number of ranks on this node, as far as the launcher tells; else the whole world."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    found = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or tasks
    return int(found or environ["WORLD_SIZE"])


def set_threads(environ: Mapping[str, str]) -> None:
    """Divide this node's cores among its ranks, unless the user set `OMP_NUM_THREADS`."""
    if environ.get("OMP_NUM_THREADS"):
        return
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    share = max(1, num_cores // local_world_size(environ))
    # Slurm has already given each task its own cores.
    torch.set_num_threads(int(environ.get("SLURM_CPUS_PER_TASK") or share))


def _hush_libraries() -> None:
    """Keep off the screen what no user of ours can act on: each rank would say it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    # transformers takes T5 v1.1's own head for a mistake; `assert_all_arrived` judges that.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger(DEEPSPEED_LOGGER).setLevel(logging.WARNING)


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _explain(error: Exception) -> str:
    first_line, *_ = str(error).splitlines() or [type(error).__name__]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return (
            f"Port {_place()} is in use, probably by another job. "
            "Choose another (deepspeed --master_port N, or MASTER_PORT)."
        )
    return f"The ranks could not meet at {_place()}: {first_line} {_MEETING}"
