"""How a verb starts and ends: its parser, and one message from one rank when it cannot go on.

The launchers end all ranks as soon as one exits non-zero, so rank 0 must have spoken before any
other rank exits. Nothing here imports torch: `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from softprompt_dist import screen
from softprompt_dist.errors import ConfigError, SoftpromptError, StoppedError
from softprompt_dist.outcome_files import of_batch_script, record_failure
from softprompt_dist.parallel.failures import PeerLostError, as_user_error, bug
from softprompt_dist.progress import phase
from softprompt_dist.redaction import redact_output, redact_text

Main = Callable[[Sequence[str] | None], None]


def _at_home(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(value)


_GRACE_SECONDS = 10.0
"""How long another rank waits to be ended by the launcher before it takes the error for its own."""


class VerbParser(argparse.ArgumentParser):
    """A parser whose help and whose errors come from one rank only.

    It takes `--debug` and ignores `--local_rank`, which DeepSpeed's launcher puts in front. `~` at
    the beginning of an argument or of an option's value is the home folder: shells see to it in
    `--output ~/x`, not in `--output=~/x`.
    """

    def __init__(self, verb: str, description: str, **settings: Any) -> None:
        super().__init__(
            prog=f"softprompt {verb}", description=description, allow_abbrev=False, **settings
        )
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        self.add_argument("--debug", action="store_true", help="show tracebacks and engine logs")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_at_home(str(word)) for word in given], namespace)

    def add_recipe_options(self) -> None:
        """Add the options that all verbs with a recipe share."""
        self.add_argument("--recipe", metavar="NAME|PATH", help="packaged recipe or YAML file")
        self.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="override one key of the recipe, such as optimizer.learning_rate=0.1; repeatable",
        )
        self.add_argument("--run-dir", metavar="PATH", help="where the run keeps its files")
        self.add_argument(
            "--deepspeed_config", metavar="JSON", help="engine plumbing; decides sharding and dtype"
        )

    def add_prompt_options(self, *, rows_of_task: bool = True) -> None:
        """Add the options that all verbs share which have a prompt file answer rows.

        Args:
            rows_of_task: whether they are the task's or those of `--data`, not the verb's own.
        """
        self.add_argument(
            "--prompt", required=True, metavar="FILE", help="prompt file (.safetensors)"
        )
        self.add_argument(
            "--task",
            metavar="NAME",
            help="another task: of the run's mixture, or of `softprompt tasks list`",
        )
        if rows_of_task:
            self.add_argument(
                "--data",
                metavar="PATH",
                help="the rows: jsonl, csv, parquet, or SuperGLUE's zip or folder",
            )
        self.add_argument(
            "--method", choices=("greedy", "rank"), help="how answers are found; see the recipe"
        )
        self.add_argument(
            "--skip-bad-rows",
            action="store_true",
            help="go on past rows that cannot be used and count them; do not end with the first",
        )
        self.add_argument(
            "--force",
            action="store_true",
            help="accept a prompt that was tuned for another backbone",
        )

    def add_run_options(self) -> None:
        """Add the options that all verbs with updates and checkpoints share."""
        self.add_argument("--steps", type=int, metavar="N", help="short for --set steps=N")
        self.add_argument(
            "--resume",
            action="store_true",
            help="continue the newest checkpoint, as is done anyway; refuse to start anew",
        )
        self.add_argument(
            "--fresh",
            action="store_true",
            help="set the run directory's checkpoints aside and begin at step 0",
        )
        self.add_argument(
            "--force",
            action="store_true",
            help="go on with a checkpoint that was saved with another backbone",
        )
        self.add_argument(
            "--dry-run", action="store_true", help="print the final config as YAML and stop"
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing, so that `run_verb` decides which rank speaks.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}\n{self.format_usage().strip()}")

    def print_help(self, file: Any = None) -> None:
        """Print the help, on rank 0 only."""
        if launched_rank() == 0:
            super().print_help(file)


def count(text: str) -> int:
    """An option's value that must be at least 1.

    Raises:
        ArgumentTypeError: it is less, or no whole number.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def run_verb(main: Main, argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main` and exit; a failure the user can act on becomes one message from one rank.

    Any other exception passes through with its traceback: it is a bug of ours. A listing that
    nobody reads to its end exits with 141, which is what shells say of programs ended by SIGPIPE.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    redact_output()
    screen.prepare()
    try:
        _run_and_flush(main, argv)
    except (Exception, KeyboardInterrupt) as error:
        if screen.is_reader_lost():
            _leave(128 + signal.SIGPIPE)
        screen.outlive_readers()
        failure = as_user_error(error, rank=launched_rank(), world_is_up=_world_is_up())
        if failure is None:
            record_failure(bug(error))
            raise
        record_failure(failure)  # before any rank leaves: its launcher ends the others
        _report(failure, redact_text(traceback.format_exc()) if debug else "")
        _leave(_exit_code(failure))
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        # All is written and the ranks have parted. Gloo's threads can still abort the interpreter's
        # own teardown ("terminate called without an active exception"), which reads as failure.
        _exit_now(0)
    sys.exit(0)


def _run_and_flush(main: Main, argv: Sequence[str] | None) -> None:
    try:
        with phase("working"):
            main(argv)
    except SystemExit:  # argparse's, after its help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _exit_code(failure: SoftpromptError) -> int:
    """Of a run that was stopped: 0, for its files tell; of a verb without any, that of a signal."""
    if isinstance(failure, StoppedError) and of_batch_script() is None:
        return 128 + signal.SIGTERM
    return failure.exit_code


def _report(failure: SoftpromptError, trace: str) -> None:
    """Print at once on rank 0. Another rank prints only what rank 0 cannot know of."""
    prefix = ""
    if launched_rank() > 0:
        if failure.on_all_ranks and _world_is_up():
            _wait_for_main()
            return
        time.sleep(_GRACE_SECONDS)
        prefix = f"[rank {launched_rank()}] "
    elif isinstance(failure, PeerLostError):
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    if isinstance(failure, StoppedError):
        print(f"{trace}Stopped: {failure}", flush=True)
    else:
        print(f"{trace}{prefix}error: {failure}", file=sys.stderr, flush=True)
    if failure.on_all_ranks and _world_is_up():
        _wait_for_main()


def _wait_for_main() -> None:
    """All ranks: return once rank 0 has spoken."""
    import torch.distributed as dist

    try:
        dist.barrier()
    except RuntimeError:
        time.sleep(_GRACE_SECONDS)


def _leave(code: int) -> NoReturn:
    if not _world_is_up():
        sys.exit(code)
    # Tearing the process group down could wait for ranks that are not coming.
    _exit_now(code)


def _exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched_rank() -> int:
    """This process's rank by its launcher, without torch; 0 for one that nobody launched."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(rank) if rank.isdigit() else 0


def _world_is_up() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1
