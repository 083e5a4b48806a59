import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from softprompt_dist.cache import cache_directory
from softprompt_dist.data import downloads
from softprompt_dist.data.downloads import exclusive, fetch_from_index
from softprompt_dist.errors import DataError

CONTENT = b"the distribution"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Stands in for the pip process; `.content` is what its index serves."""

    class Pip:
        content: bytes | None = CONTENT
        commands: list[list[str]] = []
        requirements: list[str] = []

        def __call__(self, command, **_):
            self.commands.append(command)
            self.requirements.append(Path(command[-1]).read_text())
            if self.content is None:
                said = "WARNING: retrying\nERROR: no network"
                return subprocess.CompletedProcess(command, 1, "", said)
            Path(command[command.index("--dest") + 1], "x-1.tar.gz").write_bytes(self.content)
            return subprocess.CompletedProcess(command, 0, "", "")

    stand_in = Pip()
    stand_in.commands, stand_in.requirements = [], []
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads.subprocess, "run", stand_in)
    return stand_in


def fetch(filename="x-1.tar.gz"):
    return fetch_from_index("x==1", filename, SHA256, source=True)


def test_the_cache_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SOFTPROMPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "softprompt-dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "softprompt-dist"
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    assert cache_directory().is_dir()


def test_a_file_is_downloaded_once_and_pinned_before_pip_opens_it(pip):
    assert fetch().read_bytes() == CONTENT
    assert fetch().read_bytes() == CONTENT
    assert len(pip.commands) == 1
    assert pip.requirements == [f"x==1 --hash=sha256:{SHA256}\n"]
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-binary"} < set(pip.commands[0])


def test_a_damaged_cached_file_is_fetched_anew(pip):
    fetch().write_bytes(b"damaged")
    assert fetch().read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(pip):
    pip.content = b"something else"
    with pytest.raises(DataError, match=f"expected {SHA256}"):
        fetch()
    with pytest.raises(DataError, match=r"brought no file y\.whl"):
        fetch("y.whl")
    kept = [path.name for path in (cache_directory() / "downloads").iterdir()]
    assert sorted(kept) == ["x-1.tar.gz.lock", "y.whl.lock"]


def test_a_failing_pip_is_a_message_with_a_remedy(pip):
    pip.content = None
    with pytest.raises(DataError, match="x==1 with pip .ERROR: no network.*can be reached"):
        fetch()


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    entered = threading.Event()

    def enter():
        with exclusive(tmp_path / "lock"):
            entered.set()

    other = threading.Thread(target=enter)
    with exclusive(tmp_path / "lock"):
        other.start()
        assert not entered.wait(0.2)
    other.join(timeout=10)
    assert entered.is_set()
