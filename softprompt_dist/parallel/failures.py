"""What an exception that ends a verb means for the user, and for a batch script."""

from __future__ import annotations

import errno
import re
import socket

from softprompt_dist.durable import PASSING
from softprompt_dist.errors import MachineError, SoftpromptError

_REMEDIES = {
    errno.EACCES: "Give this user permission, or choose another place (--run-dir).",
    errno.EPERM: "Give this user permission, or choose another place (--run-dir).",
    errno.EISDIR: "Name a file, or choose another place (--run-dir).",
    errno.ENOTDIR: "Choose a place below a folder (--run-dir).",
    errno.EROFS: "Choose a place that can be written to (--run-dir).",
    errno.ENOSPC: "Free some space, or choose another place (--run-dir).",
    errno.EDQUOT: "Free some of the quota, or choose another place (--run-dir).",
    **dict.fromkeys(PASSING, "The disk is away: start again once it answers."),
}
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED", re.I)
_PEER_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|remote process exited"
    r"|ncclRemoteError|communicator was aborted|collective operation timeout"
    r"|NCCL operations have failed or timed out|pair closure"
    r"|timed out waiting|wait timeout|socket has timed out",
    re.IGNORECASE,
)
_FATAL = {
    "device-side assert": "As a rule an id lies outside of its table: `softprompt doctor` compares "
    "tokenizer and table; CUDA_LAUNCH_BLOCKING=1 and --debug show where it happens.",
    "no kernel image": "This build of PyTorch does not know the GPU: install the one for it.",
    "ncclInvalidUsage": "Each rank needs a GPU of its own; NCCL_DEBUG=INFO shows more.",
}
"""What ends every attempt alike, and what to do about it."""
_DEVICE = re.compile(r"CUDA (driver )?error|Cuda failure|CU(BLAS|DNN|SOLVER)_STATUS|HIP error")
_NCCL = re.compile(r"NCCL error|\bnccl[A-Z]\w*Error")
_LAST_ERROR = re.compile(r"Last error:\s*(\S.*)")


class InterruptedByUserError(SoftpromptError):
    """The user pressed Ctrl-C."""

    exit_code = 130
    outcome = "signal"


class PeerLostError(SoftpromptError):
    """Another rank ended while this one was waiting for it."""

    exit_code = 1
    outcome = "error"


def as_user_error(error: BaseException, *, rank: int, world_is_up: bool) -> SoftpromptError | None:
    """What to say of an exception that ends `rank`; None for one that is a bug of ours."""
    if isinstance(error, SoftpromptError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedByUserError("Interrupted.")
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        place = f" {error.filename}:" if error.filename else ""
        remedy = _REMEDIES[error.errno]
        return MachineError(f"Cannot read or write:{place} {error.strerror}. {remedy}")
    if isinstance(error, RuntimeError | MemoryError):
        text = "out of memory" if isinstance(error, MemoryError) else str(error)
        return _of_machine(text, f"rank {rank} on {socket.gethostname()}", world_is_up)
    return None


def bug(error: BaseException) -> MachineError:
    """What `why` says of an exception that is one of ours: its traceback is in the log."""
    return MachineError(f"A bug: {type(error).__name__}: {_first_line(str(error))} See the log.")


def _of_machine(text: str, here: str, world_is_up: bool) -> SoftpromptError | None:
    """Of what PyTorch, NCCL and CUDA raise, which can be told apart by its words alone."""
    said = _first_line(text)
    if _OUT_OF_MEMORY.search(text):
        return _fatal(
            f"No memory is left for {here}: {said} Lower batch.micro_batch_size or "
            "micro_batch_tokens, and evaluation.batch_tokens, or shard or off-load the weights: "
            "`softprompt plan` says what fits. (Unless another process has it: nvidia-smi, free.)"
        )
    for words, remedy in _FATAL.items():
        if words in text:
            return _fatal(f"{here}: {said} {remedy}")
    if _DEVICE.search(text):
        return MachineError(
            f"The GPU of {here} failed: {said} If it fails there again, leave that node out "
            f"(sbatch --exclude={socket.gethostname()}) and have the GPU looked at (nvidia-smi -q, "
            "dmesg); if it fails on other nodes, too, it is a bug: --debug shows where."
        )
    if world_is_up and _PEER_LOST.search(text):
        return PeerLostError(
            f"Another rank has ended, or is out of reach; its own message says why. Here: {said}"
        )
    if _NCCL.search(text):
        return MachineError(
            f"NCCL failed for {here}: {said} `softprompt doctor` tries it on these nodes; "
            "NCCL_DEBUG=INFO shows more."
        )
    return None


def _fatal(message: str) -> MachineError:
    failure = MachineError(message)
    failure.outcome = "fatal"
    return failure


def _first_line(text: str) -> str:
    """Or the one in which NCCL says what it has met; ends with a stop."""
    last = _LAST_ERROR.search(text)
    line = last[1] if last else next(iter(text.splitlines()), "")
    return f"{line.strip().rstrip('.')}." if line.strip() else ""
