from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softprompt_dist.errors import StoppedError
from softprompt_dist.parallel import stop

WAITS_IN_C = """
import ctypes, sys
from softprompt_dist.parallel import stop
stop.listen()
with stop.ends_while_waiting(float(sys.argv[1]), "The others did not come."):
    print("waiting", flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    # The second lock waits for ever, and no signal interrupts it.
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    stop.listen()
    yield
    stop.forget()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_remembered_and_ends_the_next_phase(number: signal.Signals) -> None:
    assert stop.wanted() == 0
    stop.end_here_if_asked("loading")
    os.kill(os.getpid(), number)
    assert stop.wanted() == number
    with pytest.raises(StoppedError, match=f"{number.name} while loading. The same command"):
        stop.end_here_if_asked("loading")


def test_the_first_of_several_is_the_reason() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wanted() == signal.SIGUSR1


def test_what_was_forgotten_ends_no_later_run() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    stop.forget()
    stop.listen()
    assert stop.wanted() == 0
    stop.end_here_if_asked("loading")


def test_the_end_leaves_other_users_of_signals_alone() -> None:
    with stop.ends_while_waiting(60, "late"):
        pass
    assert signal.set_wakeup_fd(-1) == -1
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.wanted() == signal.SIGUSR1


def started(limit_seconds: float, outcome: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_C, str(limit_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SOFTPROMPT_OUTCOME": str(outcome)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


def test_a_wait_for_other_ranks_ends_though_no_handler_of_python_can_run(tmp_path: Path) -> None:
    process = started(600, outcome=tmp_path)
    process.terminate()
    begun = time.monotonic()
    said, _ = process.communicate(timeout=10)
    assert time.monotonic() - begun < 5
    assert said == "Stopped: SIGTERM before the ranks met.\n"
    assert process.returncode == 0
    assert (tmp_path / "why").read_text() == "signal: SIGTERM before the ranks met.\n"


def test_a_wait_for_ranks_that_do_not_come_ends_as_a_hang(tmp_path: Path) -> None:
    process = started(0.5, outcome=tmp_path)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (5, "error: The others did not come.\n")
    assert (tmp_path / "why").read_text() == "hang: The others did not come.\n"
