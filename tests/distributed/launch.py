"""Start ranks as real processes on the CPU, wait for them with a hard limit, show all they said."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from softprompt_dist.parallel.extensions import prefer_own_ninja

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
GRACE_SECONDS = 20  # for the others, once one rank has failed


def without_progress(said):
    """What a process said on stderr, without the lines that tell how far it is."""
    lines = said.splitlines(keepends=True)
    return "".join(line for line in lines if not line.rstrip().endswith((" left", " so far")))


def with_fault(fault):
    """The environment for ranks of the module `faults`, which tells of `fault`."""
    path = f"{Path(__file__).parent}{os.pathsep}{REPOSITORY}"
    return {"SOFTPROMPT_FAULT": fault, "PYTHONPATH": path}


@dataclass(frozen=True)
class RankOutput:
    """What one rank left behind; `returncode` is negative for a signal."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


class RankError(AssertionError):
    """A rank failed or the limit passed; the text holds the output of every rank."""

    def __init__(self, reason, outputs):
        parts = [
            f"----- rank {o.rank}, exit code {o.returncode}\n{o.stdout[-4000:]}\n{o.stderr[-8000:]}"
            for o in outputs
        ]
        super().__init__("\n".join([reason, *parts]))
        self.outputs = outputs


class RunningRanks:
    """`world_size` processes of one command; as a context manager it leaves none behind."""

    def __init__(self, command, world_size, log_folder, env=None, python_path=()):
        self.log_folder = Path(log_folder)
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.processes = []
        for rank in range(world_size):
            variables = self._environment(rank, world_size, python_path)
            variables |= env(rank) if callable(env) else (env or {})
            with self._log(rank, "out").open("wb") as out, self._log(rank, "err").open("wb") as err:
                # Its own session: so a kill reaches its children, and nobody else's.
                process = subprocess.Popen(
                    [part.format(rank=rank) for part in command],
                    cwd=REPOSITORY,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for rank in range(len(self.processes)):
            self.kill(rank)

    def kill(self, rank, signal_number=signal.SIGKILL):
        """Send a signal to one rank and the processes it started; nothing if it has ended."""
        process = self.processes[rank]
        if process.poll() is None:
            os.killpg(process.pid, signal_number)
            if signal_number == signal.SIGKILL:
                process.wait()

    def wait_until(self, condition, timeout):
        """Wait until `condition()` is true while all ranks run."""
        deadline = time.monotonic() + timeout
        while not condition():
            if any(p.poll() is not None for p in self.processes):
                self._fail("A rank ended before the condition was met.")
            if time.monotonic() > deadline:
                self._fail(f"The condition was not met in {timeout} s.")
            time.sleep(0.02)

    def wait(self, timeout, check=True):
        """Outputs of all ranks in rank order; with `check`, any exit code but 0 raises."""
        deadline = time.monotonic() + timeout
        failed_once = False
        while any(p.poll() is None for p in self.processes):
            if not failed_once and any(p.poll() for p in self.processes):
                failed_once = True
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                self._fail(f"Not all ranks ended in {timeout} s, or soon after one failed.")
            time.sleep(0.02)
        if check and any(p.returncode for p in self.processes):
            self._fail("A rank failed.")
        return self.outputs()

    def outputs(self):
        """What every rank has said so far."""
        return [
            RankOutput(
                rank,
                process.poll() if process.poll() is not None else 0,
                self._log(rank, "out").read_text(errors="replace"),
                self._log(rank, "err").read_text(errors="replace"),
            )
            for rank, process in enumerate(self.processes)
        ]

    def _fail(self, reason):
        self.__exit__()
        raise RankError(reason, self.outputs())

    def _log(self, rank, stream):
        return self.log_folder / f"rank{rank}.{stream}"

    def _environment(self, rank, world_size, python_path):
        inherited = [os.environ.get("PYTHONPATH", "")]
        prefer_own_ninja()
        return os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *map(str, python_path), *inherited]),
        }


def start_module_on_ranks(module, arguments, world_size, log_folder, *, env=None):
    """`python -m module arguments` on every rank, running: kill it, wait for it."""
    command = [sys.executable, "-m", module, *(_literal(a) for a in arguments)]
    return RunningRanks(command, world_size, log_folder, env)


def run_module_on_ranks(module, arguments, world_size, log_folder, *, timeout=120, **options):
    """`python -m module arguments` on every rank, to the end; the RankOutput of each.

    `check=False` lets ranks end with another exit code than 0.
    """
    check = options.pop("check", True)
    with start_module_on_ranks(module, arguments, world_size, log_folder, **options) as running:
        return running.wait(timeout, check)


def run_function_on_ranks(function, world_size, log_folder, *, timeout=60, env=None, **kwargs):
    """Call `function(**kwargs)` on gloo ranks; the JSON-able value each returned, in rank order.

    `function` is a module-level function, or "module:function". Arguments go as JSON, paths as str.
    `env` is a dictionary, or gives the one of a rank.
    """
    with start_function_on_ranks(function, world_size, log_folder, env=env, **kwargs) as running:
        running.wait(timeout)
    results = [Path(log_folder) / f"rank{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) for path in results]


def start_function_on_ranks(function, world_size, log_folder, *, env=None, **kwargs):
    """As `run_function_on_ranks`, running: kill it, wait for it."""
    python_path = [WORKER.parent]
    if not isinstance(function, str):
        python_path.append(Path(inspect.getfile(function)).resolve().parent)
        function = f"{function.__module__.rpartition('.')[2]}:{function.__name__}"
    arguments = json.dumps(kwargs, default=str)
    pattern = _literal(str(log_folder)) + "/rank{rank}.json"
    command = [sys.executable, str(WORKER), function, _literal(arguments), pattern]
    return RunningRanks(command, world_size, log_folder, env, python_path)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _literal(argument):
    return str(argument).replace("{", "{{").replace("}", "}}")
