"""How a job ends, and whether it is started again: the batch scripts with a stand-in trainer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.lab import SCRIPTS, Job, Lab, starts

AWKWARD = "a b;touch pwned 'c' \"d\" $(touch pwned) `touch pwned`\n* e"


@starts(lambda lab: lab.submit("normal"))
def test_a_run_that_ends_is_complete(started: Job) -> None:
    facts = started.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert started.read("DONE") == "20"
    assert len(started.attempts(rank=0)) == len(started.attempts(rank=1)) == 1
    assert started.log.splitlines()[-1].endswith(f"nothing to do; all is in {started.run_dir}")


@starts(lambda lab: lab.submit("normal-surroundings"))
def test_what_a_rank_finds_around_it(started: Job, lab: Lab) -> None:
    started.ended()
    first, second = started.attempts(rank=0) + started.attempts(rank=1)
    assert (first["node"], second["node"]) == ("n1", "n2")
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"] == str(20000 + int(started.id))
    assert first["SOFTPROMPT_OUTCOME"] == str(started.run_dir)
    assert first["umask"] == second["umask"] == "077"
    assert first["scratch"]
    assert Path(first["TORCH_EXTENSIONS_DIR"]).parent == Path(first["TMPDIR"])
    assert Path(first["TMPDIR"]).parent == lab.scratch
    assert not Path(first["TMPDIR"]).exists(), "not removed at the end"


@pytest.mark.drill("D32")
@starts(lambda lab: lab.submit("crash-once", steps=30, fault="crash_once"))
def test_a_rank_that_dies_once_costs_one_attempt(started: Job) -> None:
    facts = started.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert started.read("DONE") == "30"
    ports = [attempt["MASTER_PORT"] for attempt in started.attempts()]
    assert len(set(ports)) == 2, "a rank that is left over may sit on the port"


@pytest.mark.drill("D32")
@starts(lambda lab: lab.submit("crash-loop", fault="crash"))
def test_a_crash_without_progress_is_tried_three_times(started: Job) -> None:
    facts = started.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "93:0", "2")
    assert len(started.attempts(rank=1)) == 3
    assert started.read("STOP").startswith("3 attempts in a row without progress; last: error:")
    # The rank that was left said that it had been told to stop, which is not why.
    assert "a rank ended without a word" in started.read("why")
    assert f"remove {started.run_dir}/STOP" in started.log.splitlines()[-1]


@pytest.mark.drill("D32")
@starts(lambda lab: lab.submit("fatal", fault="fatal"))
def test_what_a_retry_cannot_help_is_tried_once(started: Job) -> None:
    facts = started.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "93:0", "0")
    assert len(started.attempts()) == 1
    assert started.read("STOP") == started.read("why") == "fatal: the loss is nan at step 8"


def start_with_failing_srun(lab: Lab) -> Job:
    programs = lab.folder / "programs"
    programs.mkdir()
    environ = lab.environ()
    (programs / "srun").write_text(
        "#!/bin/bash\n"
        'if [[ -z ${SLURM_RESTART_COUNT-} ]]; then echo "Job credential revoked"; exit 168; fi\n'
        f'PATH="{environ["PATH"]}" exec srun "$@"\n'
    )
    (programs / "srun").chmod(0o755)
    environ["PATH"] = f"{programs}{os.pathsep}{environ['PATH']}"
    return lab.submit("launch", environ=environ)


@pytest.mark.drill("D32")
@starts(start_with_failing_srun)
def test_a_launch_that_fails_is_tried_again(started: Job) -> None:
    facts = started.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert "srun ended with 168" in started.log
    assert len(started.attempts()) == 1


@pytest.mark.drill("D31")
@starts(lambda lab: lab.submit("cancelled", steps=100_000))
def test_a_cancelled_job_saves_and_is_not_started_again(started: Job, lab: Lab) -> None:
    started.at_work()
    lab.cluster.call("scancel", started.id)
    facts = started.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert started.read("why").startswith("signal: SIGTERM after step")
    assert int(started.read("step")) == started.steps_run()[-1]
    assert f"RUN_DIR={started.run_dir}" in started.log.splitlines()[-1].replace("'", "")


@pytest.mark.drill("D3")
@starts(lambda lab: lab.submit("stopped", steps=100_000))
def test_the_user_s_warning_saves_and_queues_again(started: Job, lab: Lab) -> None:
    started.at_work()
    lab.cluster.call("scancel", "--batch", "--signal=USR1", started.id)
    started.at_work(restart=1)
    (started.run_dir / "STOP").write_text("enough\n")
    lab.cluster.call("scancel", "--batch", "--signal=USR2", started.id)
    facts = started.ended()
    assert (facts["ExitCode"], facts["Restarts"]) == ("93:0", "1")
    assert "enough" in started.log.splitlines()[-2]
    for name in ("USR1", "USR2"):
        said = f"srun ended with 0; signals here: {name}; signal: SIG{name} after step"
        assert said in started.log, "the script must wait until the ranks have saved"
    steps = started.steps_run()
    assert steps == list(range(1, steps[-1] + 1)), "steps were run twice"


def start_chain(lab: Lab, restarts: int) -> Job:
    # More seconds of warning than the job may run: it comes with Slurm's next look at the clock.
    options = ["--time=1", "--signal=B:USR1@60"]
    return lab.submit(
        f"chain-{restarts}",
        options=options,
        finish_after_restarts=restarts,
        steps=100_000,
        step_seconds=0.2,
    )


def check_chain(job: Job, restarts: int) -> None:
    facts = job.ended(seconds=80 * restarts)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(restarts))
    assert len(job.attempts()) == restarts + 1
    steps = job.steps_run()
    assert steps == list(range(1, steps[-1] + 1)), "steps were run twice"


@pytest.mark.drill("D27")
@starts(lambda lab: start_chain(lab, 3))
def test_a_run_longer_than_the_time_limit_goes_on_in_further_attempts(started: Job) -> None:
    check_chain(started, 3)


@pytest.mark.drill("D27")
@pytest.mark.slow
@starts(lambda lab: start_chain(lab, 6))
def test_a_run_much_longer_than_the_time_limit(started: Job) -> None:
    check_chain(started, 6)


def start_deaf(lab: Lab) -> Job:
    return lab.submit(
        "deaf",
        options=["--time=1", "--signal=B:USR1@20"],
        fault="deaf_once",
        finish_after_restarts=1,
        steps=100_000,
    )


@pytest.mark.drill("D27")
@starts(start_deaf)
def test_ranks_that_do_not_end_are_killed_at_the_limit_and_the_job_goes_on(started: Job) -> None:
    facts = started.ended(seconds=180)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert "SIGUSR1: the ranks save and end" in started.log
    assert "SIGTERM: the ranks save and end" in started.log
    assert len(started.attempts()) == 2


def start_in_container(lab: Lab) -> Job:
    scripts = lab.folder / "site"
    shutil.copytree(SCRIPTS, scripts)
    text = (scripts / "env.sh").read_text()
    for name, value in {
        "srun_options": '(--job-name="a name")',
        "container": '(env CONTAINER="a container")',
    }.items():
        assert f"\n{name}=() " in text
        text = text.replace(f"\n{name}=() ", f"\n{name}={value} ")
    (scripts / "env.sh").write_text(text)
    environ = {"SOFTPROMPT_SLURM": str(scripts)}
    return lab.submit("site", environ=environ)


@starts(start_in_container)
def test_a_site_puts_its_container_and_options_in_place(started: Job) -> None:
    assert started.ended()["JobState"] == "COMPLETED", started.log
    for attempt in started.attempts(rank=0) + started.attempts(rank=1):
        assert (attempt["container"], attempt["step"]) == ("a container", "a name")


@starts(lambda lab: lab.submit("not-again", options=["--no-requeue"], fault="crash"))
def test_a_job_that_cannot_be_queued_again_says_so(started: Job) -> None:
    facts = started.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")
    assert "submit again with RUN_DIR=" in started.log.splitlines()[-1]


def start_in_awkward_folder(lab: Lab) -> Job:
    folder = lab.folder / "awkward" / AWKWARD.replace("/", "")
    return lab.submit(
        "awkward", "--set", f"name={AWKWARD}", environ={"RUN_DIR": str(folder), "RECIPE": AWKWARD}
    )


@pytest.mark.drill("D34")
@starts(start_in_awkward_folder)
def test_names_with_spaces_quotes_and_commands_are_words(started: Job) -> None:
    assert started.ended()["JobState"] == "COMPLETED", started.log
    (attempt,) = started.attempts()
    assert attempt["SOFTPROMPT_OUTCOME"] == str(started.run_dir)
    argv = attempt["argv"]
    assert argv[argv.index("--recipe") + 1] == AWKWARD
    assert argv[argv.index("--run-dir") + 1] == str(started.run_dir)
    assert f"name={AWKWARD}" in argv
    assert not list(started.log_file.parent.rglob("pwned"))
    assert not Path("pwned").exists()


def start_two_in_one_folder(lab: Lab) -> list[Job]:
    first = lab.submit("shared", steps=100_000)
    first.at_work()
    second = lab.submit("shared-too", steps=100_000, environ={"RUN_DIR": str(first.run_dir)})
    return [first, second]


@pytest.mark.drill("D23")
@starts(start_two_in_one_folder)
def test_the_second_job_in_a_run_directory_is_refused(started: list[Job], lab: Lab) -> None:
    first, second = started
    facts = second.ended()
    assert (facts["ExitCode"], facts["Restarts"]) == ("93:0", "0")
    assert f"job {first.id} is at work in {first.run_dir}" in second.log
    before = int(first.read("step"))
    wait_until(lambda: int(first.read("step")) > before, 30, "the first must go on")
    assert first.read("why") == "running"
    assert not (first.run_dir / "STOP").exists()
    lab.cluster.call("scancel", first.id)
