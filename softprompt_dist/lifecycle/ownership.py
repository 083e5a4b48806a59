"""attempt.json: which attempt owns a run directory. One alone may publish there.

A cluster starts a job again when it has lost a node, though the ranks on that node may go on: the
later attempt takes the directory over, and the earlier one finds, before it publishes anything,
that it is no longer the owner. Two living runs are another matter: the second is refused.

A file that cannot be read says nothing: the run goes on, publishes nothing meanwhile, and ends only
where the disk stays away for minutes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from softprompt_dist import durable
from softprompt_dist.durable import patiently, pauses, replace_file
from softprompt_dist.errors import DirectoryInUseError, OwnerUnknownError, SupersededError
from softprompt_dist.lifecycle.heartbeat import HEARTBEAT
from softprompt_dist.outcome_files import OutcomeFiles, announce
from softprompt_dist.parallel.verb import launched_rank

log = logging.getLogger(__name__)

ATTEMPT = "attempt.json"
_SILENCE_SECONDS = 60.0
"""Of the heart of a run on another machine, whose processes cannot be seen from here."""
_MALFORMED = (ValueError, KeyError, TypeError, RecursionError)
"""What reading a file raises that is there, and is none of ours."""
_GONE_SECONDS = 5.0
"""Without an attempt.json in a directory that is there: a later attempt has taken it along. For a
moment a network disk may show none while one is replaced."""
_SETTLING_SECONDS = 0.3
"""Two runs that claim a directory at one moment: the last to write its name has it."""


@dataclass(frozen=True)
class Owner:
    """An attempt, as attempt.json tells of it."""

    token: str
    host: str
    pid: int
    started: int
    """Clock ticks from the machine's start to the process's: tells it from a later one of its
    number."""
    job: str = ""
    """Slurm's; empty for none."""
    restart: int = 0
    """How often Slurm has started the job again."""
    place: str = ""
    """Where `pid` means something: the machine's boot and its namespace of processes, for
    containers may share a host's name."""

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> Owner:
        """This process, as a new attempt."""
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job=environ.get("SLURM_JOB_ID", ""),
            restart=int(restart) if restart.isdecimal() else 0,
            place=_place(),
        )

    @property
    def described(self) -> str:
        """For people."""
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


class Ownership:
    """The right to publish in `folder`, for `owner` or a new one; nothing here is collective."""

    def __init__(self, folder: Path, owner: Owner | None = None) -> None:
        self._path = folder / ATTEMPT
        self.owner = owner or Owner.here(os.environ)
        self._unknown_since: float | None = None
        self._gone_since: float | None = None
        self._why_unknown = ""
        self._has_warned = False

    def claim(self) -> None:
        """Become the owner.

        Raises:
            DirectoryInUseError: another run is alive there.
        """
        refuse_if_in_use(self._path.parent, self.owner)
        replace_file(self._path, json.dumps(asdict(self.owner), indent=1).encode())
        time.sleep(_SETTLING_SECONDS)
        found = patiently(lambda: _found_owner(self._path.parent))
        if found is not None and found.token != self.owner.token:
            raise _in_use(self._path.parent, found)

    def check(self) -> None:
        """Whether this attempt is still the owner; waits while nobody can tell.

        Raises:
            SupersededError: a later attempt is.
            OwnerUnknownError: nobody could tell for as long as a disk may be away.
        """
        found = self._look()
        for pause in pauses():
            if found is not None or self._is_gone() or self._is_unknown_for_too_long():
                break
            self._warn()
            time.sleep(pause)
            found = self._look()
        if found is None and self._is_gone():
            raise self._superseded("nobody knows whom")
        if found is None:
            raise OwnerUnknownError(
                f"{self._path} cannot be read ({self._why_unknown}), for "
                f"{self._unknown_seconds():.0f} s now: whose {self._path.parent} is cannot be "
                "told, so this attempt ends and publishes nothing more. Look at the disk; the same "
                "command goes on from the newest checkpoint."
            )
        if found.token != self.owner.token:
            raise self._superseded(found.described)

    def is_over(self) -> bool:
        """Without waiting: whether `check` would raise."""
        found = self._look()
        if found is None:
            self._warn()
            return self._is_gone() or self._is_unknown_for_too_long()
        return found.token != self.owner.token

    def is_held(self) -> bool:
        """Whether it is known that this attempt is the owner."""
        found = self._look()
        return found is not None and found.token == self.owner.token

    def is_lost(self) -> bool:
        """Whether it is known that another attempt is the owner."""
        found = self._look()
        return found is not None and found.token != self.owner.token

    def _look(self) -> Owner | None:
        """The owner; None where nobody can tell, since when is kept in mind."""
        try:
            found = _read_owner(self._path.parent)
        except (OSError, *_MALFORMED) as error:
            self._why_unknown = str(error)
            self._unknown_since = self._unknown_since or time.monotonic()
            is_gone = isinstance(error, FileNotFoundError) and os.path.isdir(self._path.parent)
            self._gone_since = (self._gone_since or time.monotonic()) if is_gone else None
            return None
        self._unknown_since = self._gone_since = None
        return found

    def _superseded(self, by: str) -> SupersededError:
        return SupersededError(
            f"{self._path.parent} was taken over by {by}: this attempt ({self.owner.token}) ends "
            "and publishes nothing more."
        )

    def _is_gone(self) -> bool:
        since = self._gone_since
        return since is not None and time.monotonic() - since > _GONE_SECONDS

    def _warn(self) -> None:
        if not self._has_warned:
            log.warning(
                "Whose the run directory is cannot be told for now (%s). The run goes on, and "
                "publishes nothing until it can be.",
                self._why_unknown,
            )
        self._has_warned = True

    def _unknown_seconds(self) -> float:
        return 0.0 if self._unknown_since is None else time.monotonic() - self._unknown_since

    def _is_unknown_for_too_long(self) -> bool:
        return self._unknown_seconds() > durable.PATIENCE_SECONDS

    def release(self) -> None:
        """Let another run have the folder at once."""
        mine = self._path.with_name(f".{ATTEMPT}-{self.owner.token}")
        with suppress(OSError, ValueError, KeyError):
            self._path.rename(mine)  # and only then looked at: it may be taken over this moment
            if json.loads(mine.read_bytes())["token"] == self.owner.token:
                mine.unlink()
            else:
                mine.replace(self._path)


def begin_in(folder: Path) -> None:
    """Any rank, before the ranks have met: nothing stands against a run in `folder`.

    Rank 0 looks for another run, as the next attempt's is likely to be on its machine: there alone
    one can see whether a process is alive. What ends this one from now on is told in `folder`.

    Raises:
        DirectoryInUseError: another run is alive there.
        StopFileError: there is a STOP file.
    """
    if launched_rank() == 0:
        refuse_if_in_use(folder)
        OutcomeFiles(folder).forget_earlier_attempts()
    announce(folder)
    OutcomeFiles(folder).refuse_if_stopped()


def read_owner(folder: Path) -> Owner | None:
    """What attempt.json says; None where there is none that can be read."""
    with suppress(OSError, *_MALFORMED):
        return _read_owner(folder)
    return None


def refuse_if_in_use(folder: Path, newcomer: Owner | None = None) -> None:
    """Before anything slow: whether another run is alive in `folder`.

    Raises:
        DirectoryInUseError: with its job, process and host.
        OSError: attempt.json is there, and cannot be read.
    """
    newcomer = newcomer or Owner.here(os.environ)
    found = patiently(lambda: _found_owner(folder))
    if found is None:
        return
    is_same_job = bool(found.job) and found.job == newcomer.job
    if is_same_job and found.restart < newcomer.restart:
        return  # Slurm has ended it, or has lost the node that it was on
    if is_alive(found, folder):
        raise _in_use(folder, found)


def is_alive(owner: Owner, folder: Path) -> bool:
    """Whether an attempt goes on, as far as can be told from here."""
    if owner.place and owner.place == _place():
        return _started(owner.pid) == owner.started and not _is_halted(owner.pid)
    return seconds_since_heartbeat(folder) < _SILENCE_SECONDS


def seconds_since_heartbeat(folder: Path) -> float:
    """By the file system's own clock, for machines' clocks differ; infinite where there is none."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    try:
        last = (folder / HEARTBEAT).stat().st_mtime
        try:
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        except OSError:  # somebody who may only read it asks
            now = time.time()
    except OSError:
        return float("inf")
    return max(0.0, now - last)


def _found_owner(folder: Path) -> Owner | None:
    """What attempt.json says; None where there is none, or one that no attempt has written."""
    with suppress(FileNotFoundError, NotADirectoryError, *_MALFORMED):
        return _read_owner(folder)
    return None


def _read_owner(folder: Path) -> Owner:
    values = json.loads((folder / ATTEMPT).read_bytes())
    return Owner(**{field.name: _checked(values, field) for field in fields(Owner)})


def _in_use(folder: Path, owner: Owner) -> DirectoryInUseError:
    return DirectoryInUseError(
        f"{folder} is in use by {owner.described}. Two runs in one directory would spoil each "
        "other's. Wait for it, end it, or pass another --run-dir."
    )


def _place() -> str:
    """Empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat_fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on; empty where there is no such process."""
    try:
        # Between the parentheses stands a name, which may be of any bytes.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return text.rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> int:
    found = _stat_fields(pid)
    return int(found[19]) if len(found) > 19 else -1


def _is_halted(pid: int) -> bool:
    """Stopped by a signal, or dead and not yet waited for."""
    return _stat_fields(pid)[:1] in (["T"], ["t"], ["Z"], ["X"], [])


def _checked(values: dict[str, Any], field: Field[Any]) -> Any:
    value = values[field.name]
    if type(value).__name__ != field.type:  # annotations are strings here
        raise TypeError(f"{field.name} is {value!r}, not a {field.type}")
    return value
