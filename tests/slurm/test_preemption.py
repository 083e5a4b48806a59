"""A job whose nodes are taken away: by an urgent one, or because they die."""

from __future__ import annotations

import os

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.lab import Job, Lab, starts


def start_two_for_scarce_nodes(lab: Lab) -> tuple[Job, Job]:
    options = ["--partition=scarce"]
    victim = lab.submit("victim", options=options, steps=100_000, finish_after_restarts=1)
    victim.at_work()
    return victim, lab.submit("urgent", options=["--partition=urgent"])


def check_goes_on_where_it_was(victim: Job, urgent: Job) -> None:
    assert urgent.ended()["JobState"] == "COMPLETED"
    facts = victim.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1")
    steps = victim.steps_run()
    assert steps == list(range(1, steps[-1] + 1)), "steps were run twice"


@pytest.mark.drill("D28")
@starts(start_two_for_scarce_nodes)
def test_ranks_that_are_told_to_go_save_and_the_job_waits(started: tuple[Job, Job]) -> None:
    victim, urgent = started
    check_goes_on_where_it_was(victim, urgent)
    assert "signals here: none; signal: SIGTERM after step" in victim.log


@pytest.mark.drill("D28")
@starts(start_two_for_scarce_nodes, "other")
def test_a_script_that_is_told_to_go_passes_it_on(started: tuple[Job, Job]) -> None:
    victim, urgent = started
    check_goes_on_where_it_was(victim, urgent)
    assert "signals here: USR1" in victim.log


def start_two_and_lose_the_node_of_rank_0(lab: Lab) -> tuple[Job, Job]:
    """The first loses all that it has there. Of the second all goes on there, unheard of."""
    lost = lab.submit("lost", steps=100_000, finish_after_restarts=1)
    unheard = lab.submit("unheard", steps=100_000)
    for job in (lost, unheard):
        job.at_work(step=10)
        assert job.attempts(rank=0)[0]["node"] == "n1"
    lab.cluster.kill_slurmd("n1")
    lab.cluster.kill_job_on("n1", lost.id)
    return lost, unheard


@pytest.mark.drill("D29")
@starts(start_two_and_lose_the_node_of_rank_0, "other")
def test_a_lost_node_costs_what_was_not_saved(started: tuple[Job, Job], other_lab: Lab) -> None:
    lost, unheard = started
    facts = lost.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1")
    steps = lost.steps_run()
    assert set(steps) == set(range(1, max(steps) + 1))
    assert len(steps) - len(set(steps)) < 10, "the stand-in saves every ten steps"
    assert "softprompt_dist.train starts at step" in lost.log

    check_nothing_comes_from_the_unheard(unheard)
    other_lab.cluster.call("scancel", unheard.id)
    assert unheard.ended()["Restarts"] == "1"


def check_nothing_comes_from_the_unheard(job: Job) -> None:
    job.at_work(restart=1)
    first, second = job.attempts(rank=0)
    superseded = job.run_dir / f"superseded-{job.id}.0"
    wait_until(superseded.exists, 30, "the rank on the lost node must go on until it is superseded")
    wait_until(lambda: "Slurm has given this job to other nodes" in job.log, 60, job.log)
    before = int(job.read("step"))
    wait_until(lambda: int(job.read("step")) > before, 30, "the later attempt must go on")
    assert first["node"] == "n1" != second["node"]
    assert os.path.exists(f"/proc/{second['pid']}")
    assert job.read("why") == "running"
    assert job.facts["JobState"] == "RUNNING"
