from softprompt_dist.errors import ConfigError, DataError, SoftpromptError
from softprompt_dist.parallel import ranks


def _fail(error):
    raise error


def caught(call, work):
    try:
        return call(work)
    except SoftpromptError as error:
        return f"{type(error).__name__}: {error}"


def errors_of_every_kind():
    rank = ranks.rank()
    return {
        "together, all well": caught(ranks.together, lambda: rank * 10),
        "together, rank 1 fails": caught(
            ranks.together, lambda: _fail(DataError("row 7")) if rank == 1 else rank
        ),
        "together, both fail": caught(
            ranks.together, lambda: _fail(ConfigError(f"seen by rank {rank}"))
        ),
        "on_main, well": caught(ranks.on_main, lambda: f"from rank {rank}"),
        "on_main, fails": caught(ranks.on_main, lambda: _fail(DataError(f"on rank {rank}"))),
        "still in step": ranks.gather_objects(rank),
    }


def test_all_ranks_raise_the_same_error_and_stay_in_step(run_on_ranks):
    first, second = run_on_ranks(errors_of_every_kind, 2)
    assert (first.pop("together, all well"), second.pop("together, all well")) == (0, 10)
    assert first == second
    assert first == {
        "together, rank 1 fails": "DataError: row 7",
        "together, both fail": "ConfigError: seen by rank 0",
        "on_main, well": "from rank 0",
        "on_main, fails": "DataError: on rank 0",
        "still in step": [0, 1],
    }
