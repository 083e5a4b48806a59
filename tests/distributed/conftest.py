import functools
import itertools
import sys
from pathlib import Path

import pytest

# The tests are imported without being a package, so what they share needs a place to be found.
sys.path.insert(0, str(Path(__file__).parent))

import launch


@pytest.fixture
def rank_logs(tmp_path):
    """A new folder for the logs of every launch in this test."""
    counter = itertools.count()
    return lambda: tmp_path / f"ranks-{next(counter)}"


@pytest.fixture(scope="module")
def module_rank_logs(tmp_path_factory):
    """A new folder for the logs of every launch that the tests of a file share."""
    return lambda: tmp_path_factory.mktemp("ranks") / "logs"


@pytest.fixture(scope="module")
def run_functions(module_rank_logs):
    """`run_on_ranks` for fixtures that the tests of a file share."""
    return lambda function, world_size, **kwargs: launch.run_function_on_ranks(
        function, world_size, module_rank_logs(), **kwargs
    )


@pytest.fixture(scope="module")
def run_modules(module_rank_logs):
    """`run_module_on_ranks` for fixtures that the tests of a file share."""
    return lambda module, arguments, world_size, **options: launch.run_module_on_ranks(
        module, arguments, world_size, module_rank_logs(), **options
    )


@pytest.fixture(scope="module")
def start_modules(module_rank_logs):
    """`start_module_on_ranks` for fixtures that the tests of a file share; a context manager."""
    return lambda module, arguments, world_size, **options: launch.start_module_on_ranks(
        module, arguments, world_size, module_rank_logs(), **options
    )


@pytest.fixture
def run_on_ranks(rank_logs):
    """`run_on_ranks(function, world_size, **kwargs)`: the value each rank returned."""
    return lambda function, world_size, **kwargs: launch.run_function_on_ranks(
        function, world_size, rank_logs(), **kwargs
    )


@pytest.fixture
def run_module_on_ranks(rank_logs):
    """`run_module_on_ranks(module, arguments, world_size, *, env, timeout, check)`."""
    return lambda module, arguments, world_size, **options: launch.run_module_on_ranks(
        module, arguments, world_size, rank_logs(), **options
    )


@pytest.fixture
def start_module_on_ranks(rank_logs):
    """As `run_module_on_ranks`, but returns at once with ranks that can be killed."""
    with_exit = []

    @functools.wraps(launch.start_module_on_ranks)
    def start(module, arguments, world_size, **options):
        running = launch.start_module_on_ranks(
            module, arguments, world_size, rank_logs(), **options
        )
        with_exit.append(running)
        return running

    yield start
    for running in with_exit:
        running.__exit__()
