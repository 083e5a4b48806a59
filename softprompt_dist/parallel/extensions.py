"""What DeepSpeed compiles: a folder of its own, no silent wait for a dead builder, kept for others.

torch guards a build by a file named `lock` and waits for it without limit and without a word. A
builder that was killed leaves it behind, and every later start then hangs. So a batch job compiles
in a folder that ends with it; what is whole is copied to the user's cache, which knows no locks,
and from there to the folders of later jobs.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from softprompt_dist.cache import cache_directory
from softprompt_dist.durable import digest_of, new_folder
from softprompt_dist.errors import MachineError

EXTENSION = "deepspeed_shm_comm"
"""What DeepSpeed compiles when it joins a world on the CPU."""

_POLL_SECONDS = 0.5
_SURE_SECONDS = 3.0
"""How long a lock must be without a builder: between building and unlocking there is a moment."""
_FRESH_SECONDS = 300.0
"""A younger lock may belong to a builder that cannot be seen: another node's or another user's."""


def choose_extensions_folder() -> Path:
    """Set `TORCH_EXTENSIONS_DIR` to a folder of our own, unless the user has set it; returns it."""
    if not os.environ.get("TORCH_EXTENSIONS_DIR"):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache_directory() / "torch_extensions" / _key())
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def fetch_build(name: str) -> None:
    """Have the extension `name` in `TORCH_EXTENSIONS_DIR` if an earlier process has kept it."""
    _copy(_kept(name), choose_extensions_folder() / name)


def keep_build(name: str) -> None:
    """Keep the extension `name`, which has just been loaded, for later processes."""
    _copy(choose_extensions_folder() / name, _kept(name))


def forget_build(name: str) -> None:
    """What is kept of `name` cannot be loaded, perhaps."""
    shutil.rmtree(_kept(name), ignore_errors=True)


def _kept(name: str) -> Path:
    return cache_directory() / "kept_extensions" / _key() / name


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all, where `target` has none; times of files too, by which ninja judges."""
    if not any(source.glob("*.so")) or (source / "lock").exists() or any(target.glob("*.so")):
        return
    # Another process may be faster; and where it cannot be, it is compiled.
    with suppress(OSError), new_folder(target) as whole:
        shutil.copytree(source, whole, dirs_exist_ok=True)


def _key() -> str:
    """What a compiled extension depends on; DeepSpeed compiles for the very processor."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    deepspeed = ""
    with suppress(metadata.PackageNotFoundError):
        deepspeed = f"-deepspeed{metadata.version('deepspeed')}"
    return f"{python}-torch{torch.__version__}{deepspeed}-{platform.machine()}-{_processor()}"


def _processor() -> str:
    """A digest of what its instructions are; empty where the system does not tell."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        known = [line for line in lines if line.startswith(("flags", "Features"))][:1]
        return digest_of("".join(known).encode()).sha256[:8]
    return ""


def check_extension_can_be_had(folder: Path, *, several_nodes: bool) -> bool:
    """Wait for a build that is going on; refuse what could never end well.

    Returns:
        Whether the extension is there already, so that nothing will be compiled.

    Raises:
        MachineError: the lock's builder is gone, or a build is needed and a tool for it is missing.
    """
    prefer_own_ninja()
    lock = folder / EXTENSION / "lock"
    wait_for_builder(lock, several_nodes=several_nodes)
    missing = missing_build_tools()
    built = any(lock.parent.glob(f"{EXTENSION}*.so"))
    if "ninja" in missing or (missing and not built):
        raise MachineError(
            f"DeepSpeed must compile its CPU communication once, but this machine has no "
            f"{' and no '.join(missing)}. Install what is missing (Debian, Ubuntu: apt-get install "
            "g++ ninja-build; conda: conda install gxx ninja) and start again."
        )
    return built


def prefer_own_ninja() -> None:
    """Put this environment's programs first on PATH if ninja is among them.

    A venv need not be activated; and another ninja would read the build log as foreign and build
    everything again.
    """
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("ninja", path=programs) and not path.startswith(f"{programs}{os.pathsep}"):
        os.environ["PATH"] = f"{programs}{os.pathsep}{path}"


def missing_build_tools() -> list[str]:
    """Names of the programs that a build needs and that are not on PATH."""
    compiler = os.environ.get("CXX", "c++")
    tools = {"ninja": "ninja", f"C++ compiler ({compiler}, g++)": compiler}
    return [name for name, program in tools.items() if shutil.which(program) is None]


def wait_for_builder(lock: Path, *, several_nodes: bool) -> None:
    """Return once `lock` is gone.

    Raises:
        MachineError: no process builds any more, so it would never go.
    """
    unheld_since: float | None = None
    while (age := _age_seconds(lock)) is not None:
        if is_builder_alive(lock) or (age < _FRESH_SECONDS and _may_be_unseen(lock, several_nodes)):
            unheld_since = None
        else:
            unheld_since = unheld_since or time.monotonic()
            if time.monotonic() - unheld_since >= _SURE_SECONDS:
                raise MachineError(
                    f"{lock} is {age:.0f} s old and no running process holds it: a build was "
                    "killed, and every start would wait for it for ever. "
                    f"Delete it (rm '{lock}') and start again."
                )
        time.sleep(_POLL_SECONDS)


def is_builder_alive(lock: Path) -> bool:
    """Whether some process of this machine, among those we may look at, has `lock` open.

    torch keeps it open as long as it builds.
    """
    try:
        wanted = os.stat(lock)
    except FileNotFoundError:
        return False
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = os.stat(link)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _age_seconds(lock: Path) -> float | None:
    try:
        return max(0.0, time.time() - lock.stat().st_mtime)
    except FileNotFoundError:
        return None


def _may_be_unseen(lock: Path, several_nodes: bool) -> bool:
    if several_nodes or not Path("/proc/self/fd").exists():
        return True
    try:
        return os.geteuid() not in (0, lock.stat().st_uid)
    except FileNotFoundError:
        return True
