"""Joining the world of ranks, whoever started them: `deepspeed`, srun, torchrun, or nobody.

DeepSpeed is imported here for the first time and not before: the variables it reads at import are
set just above. A user who set any of them keeps them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from softprompt_dist.errors import MachineError, SoftpromptError
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.parallel.extensions import check_extension_can_be_had, choose_extensions_folder

log = logging.getLogger(__name__)

_LONGEST_WAIT = timedelta(hours=2)
"""For a rank that waits while rank 0 fetches a checkpoint or tokenises a corpus."""
_ON_LEAVING: list[Callable[[], None]] = []
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_world(*, debug: bool = False) -> None:
    """All ranks: become one of them. A process that nobody launched joins a world of one.

    Raises:
        MachineError: the launcher's variables are incomplete or wrong, the build lock is stale, a
            build tool is missing, the port is taken, or two jobs met on one port.
    """
    if dist.is_initialized():
        return
    fill_rank_variables(os.environ)
    check_rank_variables(os.environ)
    on_gpu = ranks.device().type == "cuda"
    is_compiling = False
    set_threads(os.environ)
    folder = choose_extensions_folder()
    if on_gpu:
        check_gpus(torch.cuda.device_count(), os.environ)
        torch.cuda.set_device(ranks.device())
        # Where Slurm shows each task one GPU only, DeepSpeed must not look for the others.
        os.environ["LOCAL_RANK"] = str(ranks.device().index)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        several_nodes = local_world_size(os.environ) < ranks.world_size()
        built = check_extension_can_be_had(folder, several_nodes=several_nodes)
        if not built and ranks.is_main():
            log.warning("Compiling DeepSpeed's CPU communication, once: about a minute.")
        is_compiling = not built
    if not debug:
        _hush_libraries()
    with stop.ends_while_waiting(unless=is_compiling):
        _init_deepspeed("nccl" if on_gpu else "gloo", debug=debug)
    check_one_job(job_nonce(os.environ))
    stop.end_here_if_asked("the ranks met")


def leave_world() -> None:
    """All ranks: close the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early takes the rendezvous store with it
        dist.destroy_process_group()
        _forget_groups()
    while _ON_LEAVING:
        _ON_LEAVING.pop()()
    stop.forget()


def _forget_groups() -> None:
    from deepspeed.utils import groups

    # DeepSpeed would give the engines of a later world the group of all ranks of this one.
    groups._WORLD_GROUP = None  # noqa: SLF001 - it has no function for that


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


def job_nonce(environ: Mapping[str, str]) -> str:
    """A string that all ranks of one job share and no other job has; empty where nothing tells."""
    if environ.get("SOFTPROMPT_RUN_ID"):
        return environ["SOFTPROMPT_RUN_ID"]
    if environ.get("SLURM_JOB_ID"):
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return "slurm " + ".".join(environ.get(name, "0") for name in names)
    launched = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE")
    if launched and launched == environ.get("WORLD_SIZE"):
        return f"launcher {os.getppid()} on {socket.gethostname()}"
    return ""


def check_one_job(nonce: str) -> None:
    """All ranks: refuse a world whose ranks were started by different jobs.

    Raises:
        MachineError: on every rank.
    """
    jobs = list(dict.fromkeys(ranks.gather_objects(nonce)))
    if len(jobs) > 1:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        error = MachineError(
            f"Ranks of different jobs met at {place} ({'; '.join(jobs)}), and would train on each "
            "other's gradients. Give each job a port of its own (deepspeed --master_port N)."
        )
        error.on_all_ranks = True
        raise error


def _init_deepspeed(backend: str, *, debug: bool) -> None:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with _quiet(debug):
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.INFO if debug else logging.WARNING)
            deepspeed.init_distributed(
                backend, timeout=_LONGEST_WAIT, auto_mpi_discovery=False, verbose=debug
            )
    except SoftpromptError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        raise MachineError(_explain(error, place)) from error


def _hush_libraries() -> None:
    """Keep off the screen what no user of ours can act on: each rank would say it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    # transformers takes T5 v1.1's own head for a mistake; `assert_all_arrived` judges that.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Drop what DeepSpeed prints on every rank; its warnings go to its logger all the same."""
    # Not `redirect_stdout(None)` to leave it alone: torch flushes it when it builds an extension.
    with contextlib.nullcontext() if debug else contextlib.redirect_stdout(io.StringIO()):
        yield


def _explain(error: Exception, place: str) -> str:
    first_line, *_ = str(error).splitlines() or [type(error).__name__]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return (
            f"Port {place} is in use, probably by another job. "
            "Choose another (deepspeed --master_port N, or MASTER_PORT)."
        )
    if "extension" in str(error) or isinstance(error, ImportError):
        folder = os.environ["TORCH_EXTENSIONS_DIR"]
        return (
            f"DeepSpeed could not build or load its CPU extension in {folder}: {first_line} "
            "Check that the C++ compiler works and that the folder can be written to, delete the "
            "folder, and start again (--debug shows the compiler's words)."
        )
    return (
        f"The ranks could not meet at {place}: {first_line} Check that all of them were started, "
        "and that MASTER_ADDR can be reached from every node."
    )
