"""A Slurm cluster of one's own: slurmctld and slurmd, several "nodes" on this host, for one user.

No root, no munge, no database. Its clients are told apart from other clusters' by SLURM_CONF.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4", "spare")
"""n1 and n2 have room for all jobs of a test session, and so has the spare one, which jobs get
last; n3 and n4 have room for a task each."""
_ADMIN_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Whoever may connect is believed: for a test on one machine only.
AuthType=auth/none
CredType=cred/none
# A requeued job waits until its credential has expired; 5 s is the least.
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=6
SlurmdTimeout=10
MinJobAge=3600
# This host has fewer cores than the nodes say.
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=200000,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=wide Nodes=n1,n2,spare Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=scarce Nodes=n3,n4 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=n3,n4 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{more}
"""


class Cluster:
    """Running from its making until `close`."""

    def __init__(self, folder: Path, more: str = "") -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        port, *node_ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(map(_node_line, NODES, node_ports))
        self.conf.write_text(
            _CONFIG.format(
                host=socket.gethostname().partition(".")[0],
                port=port,
                user=_user_name(),
                folder=folder,
                nodes=nodes,
                more=more,
            )
        )
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        # A GPU is a file here, and nobody opens it.
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-31]\n")
        for number in range(32):
            (folder / f"gpu{number}").touch()
        try:
            self._start("slurmctld")
            for node in NODES:
                self.start_node(node)
            wait_until(self._all_idle, 30, f"no idle nodes; see {folder}/*.log")
        except BaseException:
            self.close()
            raise

    def start_node(self, node: str) -> None:
        """Start its slurmd; also after `kill_slurmd`."""
        self._start("slurmd", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """The node's daemon dies; what it started goes on."""
        daemon = self._daemons.pop(f"slurmd {node}")
        daemon.kill()
        daemon.wait()

    def kill_job_on(self, node: str, job: str) -> None:
        """All of a job that runs there dies, slurmstepds too, as if the node did."""
        for pid in self._processes_of(node):
            is_its_daemon = _title(pid).startswith(f"slurmstepd: [{job}.")
            if is_its_daemon or _environment(pid).get("SLURM_JOB_ID") == job:
                _kill(pid)

    def _processes_of(self, node: str) -> list[int]:
        """Its jobs' processes, and the slurmstepds above them."""
        spool = str(self.folder / f"spool.{node}")
        return [
            pid
            for pid in self._processes()
            if _environment(pid).get("SLURMD_NODENAME") == node or _working_folder(pid) == spool
        ]

    def call(
        self,
        *command: str | Path,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> str:
        """What a client such as squeue prints."""
        done = subprocess.run(
            command,
            env=dict(os.environ if environ is None else environ) | {"SLURM_CONF": str(self.conf)},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Restarts, ExitCode, ..."""
        text = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))

    def close(self) -> None:
        """End jobs, daemons and all that they have left."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("scancel", "--user", _user_name(), "--signal=KILL", "--full")
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        for pid in self._processes():
            _kill(pid)

    def _start(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=_ADMIN_PATH)
        assert path is not None
        # Should the tests be killed, so are the daemons.
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        name = " ".join([program, *arguments[1:]])
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*guard, path, "-D", "-f", self.conf, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder_of(program, *arguments),
                env={**os.environ, "SLURM_CONF": str(self.conf)},
            )

    def _folder_of(self, program: str, *arguments: str) -> Path:
        """Where a daemon runs, and its slurmstepds with it: tells nodes apart."""
        return self.folder / (f"spool.{arguments[1]}" if program == "slurmd" else "state")

    def _all_idle(self) -> bool:
        try:
            states = self.call("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
        except AssertionError:  # the controller is not there yet
            return False
        return {f"{node} idle" for node in NODES} <= {state.strip() for state in states}

    def _processes(self) -> list[int]:
        """All that carry this cluster's name in their environment, but for the daemons."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        ours = [pid for pid in pids if _environment(pid).get("SLURM_CONF") == str(self.conf)]
        return [pid for pid in ours if pid not in daemons]


def wait_until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Poll; fails with `otherwise` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {otherwise}"
        time.sleep(0.2)


def is_installed() -> bool:
    """Whether this machine has Slurm's daemons and clients."""
    programs = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
    return all(shutil.which(program, path=_ADMIN_PATH) for program in programs)


def _node_line(node: str, port: int) -> str:
    cores, weight = 1 if node in ("n3", "n4") else 64, 2 if node == "spare" else 1
    return (
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cores} "
        f"RealMemory=4000 Gres=gpu:32 Weight={weight}"
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _environment(pid: int) -> dict[str, str]:
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in found if "=" in entry)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _working_folder(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
