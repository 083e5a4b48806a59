"""Lets `deepspeed --num_gpus 2 -m softprompt_dist.train` work as typed.

DeepSpeed's launcher spells the flag `--module` and refuses `-m`. `softprompt_dist_launcher.pth`,
installed beside this package, is read at every start of Python; only if the program is called
`deepspeed` does it call the one function here, before the launcher reads its arguments.
"""

from __future__ import annotations

FLAGS = frozenset(
    ["-h", "--help", "--module", "--no_python", "--no_local_rank", "--no_ssh", "--no_ssh_check"]
    + ["--force_multi", "--save_pid", "--bind_cores_to_rank", "-q", "--quiet"]
)
"""The launcher's options that take no value; any other one is followed by its value."""


def spell_module_flag_as_deepspeed_does(argv: list[str]) -> None:
    """Replace an `-m` among the launcher's own options by `--module`, in place.

    The launcher's options end at the first word that is neither an option nor an option's value:
    the script or module. What follows belongs to the user's program and is left alone.
    """
    position = 1
    while position < len(argv) and argv[position].startswith("-"):
        option, following = argv[position], argv[position + 1 : position + 2]
        if option == "-m":
            argv[position] = "--module"
            return
        has_value_apart = option not in FLAGS and "=" not in option and following != ["-m"]
        position += 2 if has_value_apart else 1
