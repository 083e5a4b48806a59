"""Lets `deepspeed --num_gpus 2 -m softprompt_dist.train` work as typed, and save when signalled.

DeepSpeed's launcher spells the flag `--module` and refuses `-m`. SIGUSR1 and SIGUSR2 would end it,
and SIGTERM would end it alone, while the ranks go on with nobody to wait for them.
`softprompt_dist_launcher.pth`, installed beside this package, is read at every start of Python;
only if the program is called `deepspeed` does it call `prepare` here, before the launcher reads its
arguments; and what launches no module of this package, `prepare` leaves as it is.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

FLAGS = frozenset(
    ["-h", "--help", "--module", "--no_python", "--no_local_rank", "--no_ssh", "--no_ssh_check"]
    + ["--force_multi", "--save_pid", "--bind_cores_to_rank", "-q", "--quiet"]
)
"""The launcher's options that take no value; any other one is followed by its value."""


def prepare(argv: list[str]) -> None:
    """All that the launcher needs before it begins, if it is to launch a module of this package."""
    spelled = list(argv)
    spell_module_flag_as_deepspeed_does(spelled)
    start = _end_of_options(spelled)
    module = "".join(spelled[start : start + 1]) if "--module" in spelled[:start] else ""
    if module.startswith("softprompt_dist."):
        argv[:] = spelled
        let_ranks_save()


def let_ranks_save() -> None:
    """Outlive the signals that tell ranks to save and end.

    What starts the ranks inherits that SIGUSR1 and SIGUSR2 are ignored; the ranks set handlers of
    their own. SIGTERM is passed on to it: it ends the ranks by SIGTERM and waits for them.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _pass_on)


def _pass_on(number: int, frame: FrameType | None) -> None:
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        sys.exit(128 + number)


def spell_module_flag_as_deepspeed_does(argv: list[str]) -> None:
    """Replace an `-m` among the launcher's own options by `--module`, in place.

    The launcher's options end at the first word that is neither an option nor an option's value:
    the script or module. What follows belongs to the user's program and is left alone.
    """
    end = _end_of_options(argv)
    if argv[end : end + 1] == ["-m"]:
        argv[end] = "--module"


def _end_of_options(argv: list[str]) -> int:
    """Where the launcher's own options end, or an `-m` among them stands."""
    position = 1
    while position < len(argv) and argv[position].startswith("-") and argv[position] != "-m":
        option, following = argv[position], argv[position + 1 : position + 2]
        is_flag = option in FLAGS or following in (["-m"], ["--module"])
        position += 1 if is_flag or "=" in option else 2
    return position
