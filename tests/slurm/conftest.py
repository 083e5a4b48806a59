from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, is_installed
from tests.slurm.lab import Job, Lab

SIGNALLING = "SlurmctldParameters=preempt_send_user_signal"
"""With it a preempted job's script hears of it first; without it, its ranks."""


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Lab]]:
    """`common`, and `other`, which signals otherwise and loses nodes."""
    if not is_installed():
        pytest.skip("Slurm is not installed (Debian, Ubuntu: apt-get install slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    with (
        closing(Cluster(folder / "common")) as common,
        closing(Cluster(folder / "other", SIGNALLING)) as other,
    ):
        yield {
            "common": Lab(common, folder / "common-jobs"),
            "other": Lab(other, folder / "other-jobs"),
        }


@pytest.fixture(scope="session")
def lab(clusters: dict[str, Lab]) -> Lab:
    """Of the common cluster."""
    return clusters["common"]


@pytest.fixture(scope="session")
def other_lab(clusters: dict[str, Lab]) -> Lab:
    """Of the other cluster."""
    return clusters["other"]


@pytest.fixture(scope="session")
def all_started(request: pytest.FixtureRequest, clusters: dict[str, Lab]) -> dict[Any, Any]:
    """Test -> its jobs, of all tests that are going to run."""
    tests = [getattr(item, "function", None) for item in request.session.items]
    starting = [test for test in dict.fromkeys(tests) if hasattr(test, "start")]
    return {test: test.start(clusters[test.cluster]) for test in starting}


@pytest.fixture
def started(request: pytest.FixtureRequest, all_started: dict[Any, Any]) -> Any:
    """What the test's `starts` has submitted."""
    return all_started[request.function]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What became of a test's first job that was queued again is for the resilience table."""
    yield
    started = getattr(item, "funcargs", {}).get("started")
    jobs = started.values() if isinstance(started, dict) else started
    jobs = jobs if isinstance(jobs, Iterable) else [jobs]
    noted = [job.noted() for job in jobs if isinstance(job, Job)]
    item.user_properties += next((n for n in noted if n["requeues"]), {}).items()
