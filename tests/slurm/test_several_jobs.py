"""Jobs that wait for others, and arrays of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.slurm.lab import Job, Lab, starts


def submit_after(lab: Lab, name: str, parents: Sequence[Job], after: str) -> Job:
    ids = ":".join(parent.id for parent in parents)
    options = [f"--dependency=afterok:{ids}", "--kill-on-invalid-dep=yes"]
    return lab.submit(name, options=options, environ={"SOFTPROMPT_AFTER": after})


def start_chain(lab: Lab) -> list[Job]:
    parent = lab.submit("adapt run", script="adapt_xxl.sh", steps=100_000, finish_after_restarts=1)
    parent.at_work()
    child = submit_after(lab, "tune", [parent], f"{parent.run_dir}:20")
    lab.cluster.call("scancel", "--batch", "--signal=USR1", parent.id)
    return [parent, child]


@pytest.mark.drill("D30")
@starts(start_chain)
def test_a_dependent_waits_over_requeues_and_runs_once(started: list[Job]) -> None:
    parent, child = started
    assert child.ended()["JobState"] == "COMPLETED", child.log
    assert parent.facts["JobState"] == "COMPLETED"
    assert parent.facts["Restarts"] == "1"
    assert len(child.attempts()) == 1
    assert child.facts["StartTime"] >= parent.facts["EndTime"]


def start_failing_chain(lab: Lab) -> list[Job]:
    parent = lab.submit("failing-adapt", script="adapt_xxl.sh", fault="fatal")
    return [parent, submit_after(lab, "tune-of-failing", [parent], str(parent.run_dir))]


@pytest.mark.drill("D30")
@starts(start_failing_chain)
def test_the_dependent_of_a_run_that_failed_never_starts(started: list[Job]) -> None:
    parent, child = started
    assert parent.ended()["ExitCode"] == "93:0"
    assert child.ended()["JobState"] == "CANCELLED"
    assert not child.run_dir.exists()


def start_after_incomplete(lab: Lab) -> list[Job]:
    stopped_early = lab.submit("short", steps=20)
    never_done = lab.folder / "not-there"
    after = f"{stopped_early.run_dir}:20\n\n{never_done}\n"
    missing = submit_after(lab, "after-missing", [stopped_early], after)
    too_short = submit_after(lab, "after-short", [stopped_early], f"{stopped_early.run_dir}:21")
    return [missing, too_short]


@pytest.mark.drill("D30")
@starts(start_after_incomplete)
def test_a_job_that_is_completed_is_no_run_that_is(started: list[Job]) -> None:
    missing, too_short = started
    for job, reason in (
        (missing, "not-there has no DONE, so that run is not complete"),
        (too_short, "short ended at step 20, but 21 are needed"),
    ):
        assert job.ended()["ExitCode"] == "93:0"
        assert job.read("why").startswith("fatal: ")
        assert job.read("why").endswith(reason)
        assert not job.attempts()
        assert not (job.run_dir / "STOP").exists(), "it may be submitted again"


def start_sweep(lab: Lab) -> dict[str, Job]:
    """Two tasks with two seeds, two at a time; one element's run directory is spoilt."""
    folder = lab.folder / "sweep"
    environ = {"TASKS": "boolq cb", "SEEDS": "0 7", "SWEEP_DIR": str(folder), "RECIPE": "any"}
    (folder / "boolq-seed7").mkdir(parents=True)
    (folder / "boolq-seed7" / "STOP").write_text("spoilt\n")
    # The last one, whose number is the array's, needs a second attempt.
    tuning = lab.submit(
        "sweep",
        script="sweep.sh",
        options=["--array=0-3%2"],
        environ=environ,
        fault="crash_once",
        only="cb-seed7",
    )
    scoring = lab.submit(
        "sweep-evaluate",
        script="sweep.sh",
        options=["--array=0-3", f"--dependency=aftercorr:{tuning.id}", "--kill-on-invalid-dep=yes"],
        environ=environ | {"SWEEP_VERB": "evaluate"},
    )
    return {"tuning": tuning, "scoring": scoring}


@pytest.mark.drill("D33")
@starts(start_sweep)
def test_the_elements_of_a_sweep_do_not_hurt_each_other(started: dict[str, Job], lab: Lab) -> None:
    def element(verb: str, index: int, folder: str) -> Job:
        array = started[verb]
        run_dir = lab.folder / "sweep" / folder
        return Job(lab.cluster, f"{array.id}_{index}", run_dir, array.log_file)

    folders = ["boolq-seed0", "boolq-seed7", "cb-seed0", "cb-seed7"]
    tuned = [element("tuning", index, folder) for index, folder in enumerate(folders)]
    scored = [
        element("scoring", index, f"{folder}/evaluation") for index, folder in enumerate(folders)
    ]
    assert [job.ended()["ExitCode"] for job in tuned] == ["0:0", "93:0", "0:0", "0:0"]
    assert [job.read("DONE") for job in tuned] == ["20", "", "20", "20"]
    assert [job.facts["Restarts"] for job in tuned] == ["0", "0", "0", "1"]
    good = [job for job in tuned if job.attempts()]
    assert len({job.attempts()[0]["MASTER_PORT"] for job in good}) == 3
    for job in good:
        argv = job.attempts()[0]["argv"]
        task, seed = job.run_dir.name.split("-seed")
        assert argv[4:10] == [
            *("--run-dir", str(job.run_dir)),
            *("--set", f"task.catalogue={task}", "--set", f"seed={seed}"),
        ]
        assert argv[argv.index("--recipe") + 1] == "any"
    assert [job.ended()["JobState"] for job in scored] == [
        *("COMPLETED", "CANCELLED", "COMPLETED", "COMPLETED")
    ]
    argv = scored[3].attempts()[0]["argv"]
    assert argv[argv.index("--prompt") + 1] == str(tuned[3].run_dir / "prompt/best.safetensors")


@starts(lambda lab: lab.submit("scored", script="evaluate_xxl.sh", environ={"PROMPT": "p q"}))
def test_a_prompt_is_scored_into_its_run_directory(started: Job) -> None:
    assert started.ended()["JobState"] == "COMPLETED"
    argv = started.attempts()[0]["argv"]
    assert argv == [
        *("--prompt", "p q", "--deepspeed_config", "ds_configs/replicated_bf16.json"),
        *("--output", str(started.run_dir)),
    ]
