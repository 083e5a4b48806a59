"""Start a function of a benchmark on N ranks, each a process of its own, and collect its answer.

Every variant gets fresh processes: memory, patched libraries and warm allocators of one must not
reach the next.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_dist.parallel.extensions import choose_extensions_folder, prefer_own_ninja

REPOSITORY = Path(__file__).parents[1]
_POLL_SECONDS = 0.1
_WORDS_OF_A_FAILURE = 4000


class RankFailedError(RuntimeError):
    """A rank ended with an error, or none ended in time; with the last words of its stderr."""


def run_ranks(
    target: str,
    settings: Mapping[str, Any],
    *,
    num_ranks: int = 2,
    device: str = "cpu",
    timeout_seconds: float = 3600.0,
) -> list[dict[str, Any]]:
    """The answers of `target` on all ranks, in rank order.

    Args:
        target: `module:function`; the function takes the settings and returns a JSON-able dict.
        settings: JSON-able.
        num_ranks: processes to start; on the CPU each has one thread.
        device: `cpu` or `cuda`.
        timeout_seconds: after which all are ended.

    Raises:
        RankFailedError: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as name:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        environ = _environment(num_ranks, device)
        processes = [_start(target, folder, rank, environ) for rank in range(num_ranks)]
        try:
            _wait(processes, target, folder, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads(_result(folder, rank).read_bytes()) for rank in range(num_ranks)]


def hush_transformers() -> None:
    """No bars, and no warning that T5 v1.1's own head is a mistake."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _environment(num_ranks: int, device: str) -> dict[str, str]:
    choose_extensions_folder()
    prefer_own_ninja()
    environ = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environ


def _start(
    target: str, folder: Path, rank: int, environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.ranks", target, str(folder), str(rank)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], target: str, folder: Path, deadline: float
) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    for rank, process in enumerate(processes):
        code = process.poll()
        if code is None and any(other.poll() for other in processes):
            continue  # another rank's words tell why
        if code != 0:
            words = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")
            fate = "did not end in time" if code is None else f"ended with {code}"
            raise RankFailedError(
                f"Rank {rank} of {target} {fate}:\n{words[-_WORDS_OF_A_FAILURE:]}"
            )


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main() -> None:
    """One rank."""
    hush_transformers()
    target, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    module, _, name = target.partition(":")
    settings = json.loads((folder / "settings.json").read_bytes())
    answer = getattr(importlib.import_module(module), name)(settings)
    _result(folder, rank).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _main()
