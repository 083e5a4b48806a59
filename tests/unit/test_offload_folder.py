"""Each process's part of an off-load path is its own, and nothing is left there for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt_dist.backbone.offload import assert_offload_possible, claim_folder
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel.join import leave_world


def folder_of(pid: int, parent: Path) -> Path:
    return parent / f"softprompt-{socket.gethostname()}-{pid}"


class Builder:
    """In place of DeepSpeed's, whose build takes ten minutes."""

    name = "async_io"
    built = 0

    def is_compatible(self, verbose: bool) -> bool:
        return True

    def load(self, verbose: bool) -> None:
        file = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name / "async_io.so"
        if not file.exists():
            type(self).built += 1
            file.parent.mkdir(parents=True)
            file.write_bytes(b"code")
        if file.read_bytes() == b"torn":
            raise ImportError("invalid ELF header")


def test_what_writes_to_disks_is_compiled_once_for_all_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder", Builder)
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = BackboneConfig(
        path="t5", sharding="zero3", offload="nvme", offload_path=str(tmp_path / "disk")
    )

    def job(name: str) -> None:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / name))
        assert_offload_possible(config)

    job("first")
    job("second")
    assert Builder.built == 1
    (kept,) = tmp_path.glob("cache/kept_extensions/*/async_io/async_io.so")
    kept.write_bytes(b"torn")
    with pytest.raises(MachineError, match=r"could not be built or loaded .* invalid ELF header"):
        job("third")
    job("fourth")  # what is torn is kept no longer
    assert Builder.built == 2


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
