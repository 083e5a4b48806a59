"""Whether parts of a backbone can be moved to a local disk, found out before anything is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import MachineError


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
