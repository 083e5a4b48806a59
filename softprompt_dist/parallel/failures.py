"""What an exception that ends a verb means for the user, and for a batch script."""

from __future__ import annotations

import errno
import re

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
_PEER_LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe", re.IGNORECASE)


class InterruptedByUserError(SoftpromptError):
    """The user pressed Ctrl-C."""

    exit_code = 130
    outcome = "signal"


class PeerLostError(SoftpromptError):
    """Another rank ended while this one was waiting for it."""

    exit_code = 1
    outcome = "error"


def as_user_error(error: BaseException, *, world_is_up: bool) -> SoftpromptError | None:
    """What to say of an exception; None for one that is a bug of ours."""
    if isinstance(error, SoftpromptError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedByUserError("Interrupted.")
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        place = f" {error.filename}:" if error.filename else ""
        remedy = _REMEDIES[error.errno]
        return MachineError(f"Cannot read or write:{place} {error.strerror}. {remedy}")
    if type(error).__name__ == "OutOfMemoryError":
        return MachineError(
            f"{str(error).splitlines()[0]} Lower batch.micro_batch_size or micro_batch_tokens, and "
            "evaluation.batch_tokens, or shard the backbone (--deepspeed_config "
            "ds_configs/zero3_bf16.json)."
        )
    if isinstance(error, RuntimeError) and world_is_up and _PEER_LOST.search(str(error)):
        return PeerLostError("Another rank has ended; its message says why.")
    return None
