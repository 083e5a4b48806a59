"""Steps of a run: the same rows for any number of ranks, micro-batch, prefetch and restart."""

import threading
import time
from itertools import islice

import pytest
import torch

from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.stream import BatchStream
from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.section import BatchConfig
from tests.lm_corpora import SPECIAL, config_of, counting_corpus, data_of, some_lengths

GLOBAL_BATCH = 12
NUM_STEPS = 5


def batch_of(micro_batch_size):
    return BatchConfig(global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size)


def steps_of(data, world_size=1, micro_batch_size=GLOBAL_BATCH, consumed=0, num_prefetched=2):
    """Per step: the labels of the global batch, put together from all ranks, and its end."""
    steps = []
    streams = [
        BatchStream(data, batch_of(micro_batch_size), consumed, rank, world_size, num_prefetched)
        for rank in range(world_size)
    ]
    for _ in range(NUM_STEPS):
        shares = [next(stream) for stream in streams]
        assert len({share.examples_consumed for share in shares}) == 1
        assert len({share.num_real_tokens for share in shares}) == 1
        micro_batches = [
            share.micro_batches[number]
            for number in range(len(shares[0].micro_batches))
            for share in shares
        ]
        assert sum(b.num_real_tokens for b in micro_batches) == shares[0].num_real_tokens
        assert sum(b.num_positions for b in micro_batches) == shares[0].num_positions
        labels = torch.cat([batch.labels_BT for batch in micro_batches])
        steps.append((labels, shares[0].examples_consumed))
    for stream in streams:
        stream.close()
    return steps


def assert_same(steps, expected):
    assert [consumed for _, consumed in steps] == [consumed for _, consumed in expected]
    for (labels, _), (other, _) in zip(steps, expected, strict=True):
        assert labels.equal(other)


@pytest.fixture(
    params=[
        {"packing": "none"},
        {"packing": "greedy"},
        {"packing": "complementary_pairs"},
        {"objective": "span_corruption", "targets_length": 16, "inputs_length": 64},
        {"objective": "lm"},
    ],
    ids=str,
)
def data(request):
    lengths = {"inputs_length": 32, "targets_length": 32}
    return data_of(counting_corpus(some_lengths(120, 60)), **{**lengths, **request.param})


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "num_prefetched"),
    [(1, 1, 1), (2, 6, 3), (2, 1, 1), (3, 2, 2), (3, 4, 1)],
)
def test_ranks_micro_batches_and_prefetch_change_nothing(
    data, world_size, micro_batch_size, num_prefetched
):
    steps = steps_of(data, world_size, micro_batch_size, num_prefetched=num_prefetched)
    assert_same(steps, steps_of(data))


def test_a_restart_goes_on_with_the_next_row(data):
    whole = steps_of(data)
    _, consumed = whole[1]
    restarted = steps_of(data, world_size=2, micro_batch_size=3, consumed=consumed)
    assert_same(restarted[: NUM_STEPS - 2], whole[2:])


def small_data():
    return data_of(counting_corpus([20] * 99), inputs_length=32, targets_length=32)


def batch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_closing_ends_the_thread_and_the_steps():
    with BatchStream(small_data(), batch_of(4), 0, 0, 1) as stream:
        assert len(list(islice(stream, 3))) == 3
        assert batch_threads()
    assert not batch_threads()
    assert list(stream) == []
    stream.close()


def test_closing_does_not_wait_for_a_whole_step():
    class Slow(LMData):
        num_made = 0

        def rows(self, plan, first, last):
            self.num_made += 1
            time.sleep(0.01)
            return super().rows(plan, first, last)

    config = config_of(inputs_length=32, targets_length=32)
    data = Slow(counting_corpus([20] * 9999), SPECIAL, config)
    stream = BatchStream(data, BatchConfig(global_batch_size=2000, micro_batch_size=1), 0, 0, 1)
    stream.close()
    assert not batch_threads()
    assert data.num_made < 1000


def test_an_error_in_the_thread_reaches_the_consumer():
    class Broken(LMData):
        def rows(self, plan, first, last):
            if plan.first_example:
                raise DataError("The second batch cannot be read.")
            return super().rows(plan, first, last)

    config = config_of(inputs_length=32, targets_length=32, packing="none")
    data = Broken(counting_corpus([20] * 99), SPECIAL, config)
    with BatchStream(data, batch_of(4), 0, 0, 1) as stream:
        next(stream)
        with pytest.raises(DataError, match="second batch"):
            next(stream)
        assert list(stream) == []
    assert not batch_threads()


def test_no_more_steps_are_made_than_asked_for():
    class Counting(LMData):
        planned = 0

        def rows(self, plan, first, last):
            self.planned = max(self.planned, plan.examples_consumed)
            return super().rows(plan, first, last)

    config = config_of(inputs_length=32, targets_length=32, packing="none")
    data = Counting(counting_corpus([20] * 99), SPECIAL, config)
    with BatchStream(data, batch_of(4), 0, 0, 1, num_prefetched=2) as stream:
        # Two wait in the queue, one more is in the hand of the thread.
        while data.planned < 3 * GLOBAL_BATCH:
            time.sleep(0.01)
        time.sleep(0.2)
        assert data.planned == 3 * GLOBAL_BATCH
        next(stream)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="global_batch_size is 12, but 5 ranks x .* Use 20"):
        BatchStream(small_data(), batch_of(2), 0, 0, 5)


def test_a_corpus_smaller_than_one_batch_is_refused():
    data = data_of(counting_corpus([20] * 11), packing="none")
    with pytest.raises(DataError, match="220 tokens in 11 documents.* 12 rows .*Give more text"):
        BatchStream(data, batch_of(4), 0, 0, 1)
