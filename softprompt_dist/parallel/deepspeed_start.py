"""Letting DeepSpeed into the world that was joined, where weights are sharded, or trained.

It is slow to import, and on the CPU it compiles; a world of replicated weights does without it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.extensions import (
    EXTENSION,
    check_extension_can_be_had,
    choose_extensions_folder,
    fetch_build,
    forget_build,
    keep_build,
)
from softprompt_dist.parallel.join import DEEPSPEED_LOGGER, local_world_size, on_leaving
from softprompt_dist.private_names import assert_known
from softprompt_dist.progress import phase

log = logging.getLogger(__name__)


def start_deepspeed() -> None:
    """All ranks: have DeepSpeed use this world. Again: nothing changes.

    It is imported here for the first time and not before: `join_world` has set the variables that
    it reads at its import.

    Raises:
        MachineError: this DeepSpeed lacks what we build on, the build lock is stale, a build tool
            is missing, or the build failed.
    """
    ranks.together(lambda: assert_known("deepspeed"))
    folder, on_cpu = choose_extensions_folder(), ranks.device().type == "cpu"
    if on_cpu:
        ranks.together(lambda: _expect_extension())
    logger = logging.getLogger(DEEPSPEED_LOGGER)
    hushed = logger.level == logging.WARNING
    try:
        with (
            _quiet() if hushed else contextlib.nullcontext(),
            phase("starting DeepSpeed, which builds its extension where there is none"),
        ):
            import deepspeed

            logger.setLevel(logging.WARNING if hushed else logging.INFO)
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=not hushed)
    except (RuntimeError, ImportError, OSError) as error:
        forget_build(EXTENSION)
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        raise MachineError(
            f"DeepSpeed could not start, or build or load its CPU extension in {folder}: "
            f"{first_line} Check that the C++ compiler works and that the folder can be written "
            "to, delete the folder, and start again (--debug shows the compiler's words)."
        ) from error
    if on_cpu:
        keep_build(EXTENSION)
    on_leaving(_forget_world)


def _expect_extension() -> None:
    several_nodes = local_world_size(os.environ) < ranks.world_size()
    folder = choose_extensions_folder()
    fetch_build(EXTENSION)
    with phase("waiting for another process to build DeepSpeed's extension"):
        is_built = check_extension_can_be_had(folder, several_nodes=several_nodes)
    if not is_built and ranks.is_main():
        log.warning("Compiling DeepSpeed's CPU communication, once: about a minute.")


def _forget_world() -> None:
    from deepspeed.utils import groups

    # DeepSpeed would give the engines of a later world the group of all ranks of this one.
    groups._WORLD_GROUP = None  # noqa: SLF001 - it has no function for that


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what DeepSpeed prints on every rank; its warnings go to its logger all the same."""
    # Not `redirect_stdout(None)`: torch flushes it when it builds an extension.
    with contextlib.redirect_stdout(io.StringIO()):
        yield
