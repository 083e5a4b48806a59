"""`softprompt VERB ...`: finds the verb's module; imports nothing heavy itself."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from softprompt_dist import __version__
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.verb import run_verb

VERBS = {
    "train": "tune a soft prompt for a frozen backbone",
    "corpus": "tokenise text once, for softprompt adapt",
    "adapt": "train all weights of a language model on plain text",
    "evaluate": "score a prompt file on a task",
    "predict": "have a prompt file answer the rows of a file",
    "tasks": "list the tasks known by name and show the text they give",
    "inspect": "show what a prompt file is and what its rows are near to",
    "convert": "write a bf16 or int8 copy of a backbone, which loads faster",
    "plan": "choose how to hold a backbone: memory, traffic, time",
    "doctor": "check this machine before a run",
    "status": "tell whether a run lives, how far it is and why it ended",
    "slurm": "adapt, tune and evaluate as batch jobs that wait for each other",
}
"""Name -> what it does; each is the module `softprompt_dist.NAME` with a `main(argv)`."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `softprompt` command."""
    run_verb(dispatch, argv)


def dispatch(argv: Sequence[str] | None = None) -> None:
    """Run the verb that `argv` names with the arguments behind it.

    Raises:
        ConfigError: no such verb.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(overview())
    elif first == "--version":
        print(f"softprompt-dist {__version__}")
    else:
        importlib.import_module(module_of(first)).main(arguments[1:])


def module_of(verb: str) -> str:
    """Full name of the verb's module.

    Raises:
        ConfigError: no such verb; the nearest is named.
    """
    if verb in VERBS:
        return f"{__package__}.{verb}"
    close = difflib.get_close_matches(verb, VERBS, n=1)
    nearest = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"Unknown verb {verb!r}.{nearest} Verbs: {', '.join(VERBS)}.")


def overview() -> str:
    """What `softprompt --help` prints."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{purpose}" for name, purpose in VERBS.items())
    return (
        "usage: softprompt VERB [options]      (softprompt VERB --help)\n\n"
        f"Prompt tuning of very large frozen language models.\n\n{verbs}\n\n"
        "On several devices: deepspeed --num_gpus N -m softprompt_dist.VERB [options]"
    )


if __name__ == "__main__":
    main()
