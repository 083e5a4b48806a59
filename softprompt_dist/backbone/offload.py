"""Parts of a backbone on a local disk: whether that can be, and where."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import psutil

from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.extensions import (
    choose_extensions_folder,
    fetch_build,
    forget_build,
    keep_build,
    wait_for_builder,
)
from softprompt_dist.parallel.join import local_world_size, on_leaving

log = logging.getLogger(__name__)


def claim_folder(parent: Path) -> Path:
    """A folder under `parent` that is this process's alone; gone when the world is left.

    DeepSpeed itself writes to names that only depend on the rank: of two jobs with one path, the
    second would empty the first's weights. What a killed process left on this machine is removed.
    """
    mine = f"softprompt-{socket.gethostname()}-"
    for left in parent.glob(f"{mine}*"):
        owner = left.name.removeprefix(mine)
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{mine}{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    on_leaving(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


def assert_offload_possible(config: BackboneConfig) -> None:
    """The folder of `offload: nvme` can be written, and DeepSpeed can build what writes there.

    Raises:
        MachineError: it cannot.
    """
    if config.offload != "nvme":
        return
    folder = Path(str(config.offload_path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise MachineError(
            f"Cannot write to backbone.offload_path {folder}: {error.strerror}. Set it to a folder "
            "on a local disk that this user may write to, or use backbone.offload=cpu."
        ) from error
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise MachineError(
            "backbone.offload is 'nvme', which needs libaio and its header, and DeepSpeed finds "
            "none. Install it (Debian, Ubuntu: apt-get install libaio-dev; others: libaio-devel), "
            "or use backbone.offload=cpu."
        )
    _load(AsyncIOBuilder())


def _load(builder: Any) -> None:
    """Now and not when the first weight is written, to keep what was compiled."""
    fetch_build(builder.name)
    folder = choose_extensions_folder() / builder.name
    several_nodes = local_world_size(os.environ) < ranks.world_size()
    wait_for_builder(folder / "lock", several_nodes=several_nodes)
    if ranks.is_main() and not any(folder.glob("*.so")):
        log.warning("Compiling what DeepSpeed writes to disks with, once: about ten minutes.")
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        forget_build(builder.name)
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        raise MachineError(
            f"backbone.offload is 'nvme', but what DeepSpeed writes to disks with could not be "
            f"built or loaded in {folder}: {first_line} Delete that folder and start again, or use "
            "backbone.offload=cpu."
        ) from error
    keep_build(builder.name)
