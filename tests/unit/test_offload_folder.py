"""Each process's part of an off-load path is its own, and nothing is left there for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from softprompt_dist.backbone.offload import claim_folder
from softprompt_dist.parallel.join import leave_world


def folder_of(pid: int, parent: Path) -> Path:
    return parent / f"softprompt-{socket.gethostname()}-{pid}"


def test_the_folder_is_this_process_s_and_goes_with_it(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path / "disk")
    assert folder == folder_of(os.getpid(), tmp_path / "disk")
    (folder / "part").write_bytes(b"weights")
    leave_world()
    assert not folder.exists()


def test_only_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, alive = folder_of(dead.pid, tmp_path), folder_of(os.getppid(), tmp_path)
    other_host = tmp_path / f"softprompt-elsewhere-{dead.pid}"
    for folder in (left, alive, other_host):
        folder.mkdir()
    claim_folder(tmp_path)
    assert not left.exists()
    assert alive.exists()
    assert other_host.exists()
    leave_world()
