"""Processes that tokenise: they outlive the signals that a cluster sends to all of a job."""

import multiprocessing
import os
import signal
import time

import pytest

from softprompt_dist.data.encoding import EncoderSpec
from softprompt_dist.data.lm.documents import RawRows
from softprompt_dist.data.lm.encoding_pool import encoding_in_order
from softprompt_dist.errors import MachineError

WORKERS = 2


def batches(count):
    for number in range(count):
        rows = [f"row {number} of a text".encode()]
        yield RawRows(0, number + 1, rows, "line", "text")


def workers():
    deadline = time.monotonic() + 60
    while len(found := multiprocessing.active_children()) < WORKERS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def encode_and_kill_a_worker(spec):
    """After 200 batches, at each of which every worker that there is was sent a signal."""
    with encoding_in_order(batches(400), spec, WORKERS) as encoded:
        for number, result in enumerate(encoded, start=1):
            assert result.last_row == number
            if number < 200:  # at first one of them may be starting still
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, (signal.SIGTERM, signal.SIGUSR1)[number % 2])
            if number == 200:
                os.kill(workers()[0].pid, signal.SIGKILL)


@pytest.mark.drill("D6")
def test_workers_ignore_signals_and_none_is_left_where_one_is_killed(tokenizer):
    with pytest.raises(MachineError, match="One of 2 processes that tokenise was killed"):
        encode_and_kill_a_worker(EncoderSpec.of(tokenizer))
    assert multiprocessing.active_children() == []
