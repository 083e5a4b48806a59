"""`python killed_in_save.py PLACE NUMBER ARGUMENT...`: `softprompt train` that dies in a save.

PLACE is `tensors` (the file is half written) or `rename` (all is written, nothing published);
NUMBER: in which save.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from softprompt_dist import train
from softprompt_dist.parallel.verb import run_verb
from softprompt_dist.run import checkpoint, checkpoint_folder

place, number, *arguments = sys.argv[1:]
saves = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(path: Path, content: bytes) -> None:
    global saves
    saves += path.name == "state.safetensors"
    if saves == int(number) and path.name == "state.safetensors":
        path.write_bytes(content[: len(content) // 2])
        die()
    real_write(path, content)


def die_before_rename(self: checkpoint_folder.CheckpointFolder, *given: object) -> None:
    global saves
    saves += 1
    if saves == int(number):
        die()
    real_publish(self, *given)


real_write = checkpoint.write_file
real_publish = checkpoint_folder.CheckpointFolder.publish
if place == "tensors":
    checkpoint.write_file = write_half
else:
    checkpoint_folder.CheckpointFolder.publish = die_before_rename  # type: ignore[method-assign]

if __name__ == "__main__":
    run_verb(train.main, arguments)
