"""The world of ranks: joining it, walking through collectives together, agreeing on errors.

Functions that contain a collective say "all ranks" in their first line. They must be reached
by every rank, or by none. A thread beside the main one takes them too, `within` a group of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from softprompt_dist.errors import SoftpromptError

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=2)
"""For a rank that waits while rank 0 fetches a checkpoint, tokenises a corpus or writes a model."""
_MARGIN = timedelta(minutes=10)
"""Who hangs is ended by its watchdog, which says where; a library's timeout says little."""


class _Way(threading.local):
    """Of this thread's collectives."""

    group: dist.ProcessGroup | None = None
    on_cpu = False


_way = _Way()


def rank() -> int:
    """This process's rank; 0 outside a distributed run."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0")


def world_size() -> int:
    """Number of ranks; 1 outside a distributed run."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this rank, or the CPU (always with `DS_ACCELERATOR=cpu`)."""
    if _way.on_cpu or os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Slurm's --gpus-per-task shows each task one device only, whatever its local rank.
    return torch.device("cuda", local_rank() if local_rank() < torch.cuda.device_count() else 0)


def unusable_gpus() -> str:
    """Why this process cannot compute on the GPUs it should; empty if it can, or should not.

    PyTorch's build says what was meant: a driver that is broken must not move a run to the CPU.
    """
    wanted = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.backends.cuda.is_built() else "")
    if wanted in ("", "cpu") or device().type == "cuda":
        return ""
    try:
        torch.cuda.init()
        reason = "It sees none."
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") + "."
    return (
        f"PyTorch {torch.__version__} is to use GPUs, but can use none here: {reason} Check the "
        "driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or set DS_ACCELERATOR=cpu to compute on the "
        "CPU."
    )


def device_name() -> str:
    """What this rank computes on, such as `NVIDIA H100 80GB HBM3`, or `cpu`."""
    return torch.cuda.get_device_name(device()) if device().type == "cuda" else "cpu"


def sent(tensor: torch.Tensor, to: torch.device) -> torch.Tensor:
    """The tensor on a device; the host does not wait until the device has done its work so far."""
    if to.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(to, non_blocking=True)
    return tensor.to(to)


def new_cpu_group() -> dist.ProcessGroup | None:
    """All ranks: a further group of all of them, for tensors on the CPU; None in a world of one."""
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo")


def let_groups_wait(limit_seconds: float = 0.0) -> timedelta:
    """From now on each group that this process makes waits for longer than any watchdog; how long.

    Those of libraries, too: NCCL's own limit is ten minutes, and DeepSpeed passes none on.
    """
    wait = max(LONGEST_WAIT, timedelta(seconds=limit_seconds)) + _MARGIN
    # No function of PyTorch sets what a group has whose maker names no limit.
    vars(distributed_c10d).update(default_pg_timeout=wait, default_pg_nccl_timeout=wait)
    return wait


def leave_group(group: dist.ProcessGroup | None) -> None:
    """All ranks: close what `new_cpu_group` made, once no thread uses it any more."""
    if group is not None:
        dist.barrier()  # what a rank that is done has sent may not have reached the others yet
        dist.destroy_process_group(group)


@contextmanager
def within(group: dist.ProcessGroup | None) -> Iterator[None]:
    """In this thread the functions here take `group` and the CPU.

    So that a thread of every rank can walk through collectives while the main threads do: a group
    keeps its own order.
    """
    _way.group, _way.on_cpu = group, True
    try:
        yield
    finally:
        _way.group, _way.on_cpu = None, False


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=_way.group)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum of `tensor` over all ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_way.group)
    return tensor


def gather_to_main(own_N: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """What each rank has, in rank order, on rank 0, and nothing elsewhere; a rank moves its own.

    Args:
        own_N: of this rank, on `device()`.
        lengths: N of every rank; a rank of which it is 0 need not come, rank 0 must.
    """
    if not is_main():
        if lengths[rank()]:
            _exchange([dist.P2POp(dist.isend, own_N, 0, _way.group)])
        return []
    others = {r: own_N.new_empty(n) for r, n in enumerate(lengths) if r and n}
    _exchange([dist.P2POp(dist.irecv, part_N, r, _way.group) for r, part_N in others.items()])
    return [others.get(r, own_N[: 0 if r else None]) for r in range(len(lengths))]


def _exchange(operations: list[dist.P2POp]) -> None:
    # One by one, NCCL would make a communicator for every pair of ranks.
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Copy rank 0's `tensor` to all ranks, in place; returns it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0, group=_way.group)
    return tensor


def broadcast_object(value: T) -> T:
    """Rank 0's picklable `value`, on all ranks."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_way.group)
    received: T = box[0]
    return received


def gather_objects(value: T) -> list[T]:
    """The picklable `value` of every rank in rank order, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_way.group)
    return values


def together(work: Callable[[], T]) -> T:
    """Run `work` on all ranks; if it fails with a user error on any, all raise the first one.

    `work` must contain no collective: a rank that fails would leave the others waiting in it.
    """
    result, error = _attempt(work)
    errors = [e for e in gather_objects(error) if e is not None]
    if errors:
        raise _marked(errors[0])
    return result  # type: ignore[return-value]


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only; its result, or its user error, reaches all ranks."""
    result, error = broadcast_object(_attempt(work) if is_main() else (None, None))
    if error is not None:
        raise _marked(error)
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, SoftpromptError | None]:
    try:
        return work(), None
    except SoftpromptError as error:
        return None, error


def _marked(error: SoftpromptError) -> SoftpromptError:
    error.on_all_ranks = True
    return error
