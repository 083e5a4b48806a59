"""`softprompt slurm pipeline`: what is submitted, skipped and refused, under programs that stand
for Slurm's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.checks.finding import ChecksFailedError
from softprompt_dist.errors import ConfigError, MachineError, SoftpromptError
from softprompt_dist.scheduling.programs import SlurmError
from softprompt_dist.slurm import main
from tests.pipelines import OPTIONS, FakeSlurm, option, pipeline_values, write_pipeline

ELEMENTS = ("boolq-seed0", "boolq-seed1", "cb-seed0", "cb-seed1")
Submit = Callable[..., str]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "programs")
    monkeypatch.setenv("PATH", fake.path)
    return fake


@pytest.fixture
def submit(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> Submit:
    """`submit(*options, **changes)`: run the verb; returns what it prints."""

    def run(*options: str, **changes: Any) -> str:
        path = write_pipeline(tmp_path, pipeline_values(tmp_path, **changes))
        main(["pipeline", str(path), *options])
        return capsys.readouterr().out

    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The pipeline's directory."""
    return tmp_path / "pipeline"


def adapted(runs: Path) -> None:
    """The adaptation is done, and its export there."""
    mark(runs / "adapt")
    (runs / "adapt" / "export").mkdir()


def mark(folder: Path, name: str = "DONE", text: str = "20") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{text}\n")
    return folder / name


def recorded(runs: Path) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = json.loads((runs / "pipeline.json").read_text())["jobs"]
    return values


def test_each_stage_waits_for_the_one_before(submit: Submit, slurm: FakeSlurm, runs: Path) -> None:
    said = submit()
    words = [job["words"] for job in slurm.submitted]
    assert [option(each, "job-name") for each in words] == [
        "small-adapt",
        "small-tune",
        "small-evaluate",
    ]
    assert [option(each, "dependency") for each in words] == [None, "afterok:101", "afterok:102"]
    assert [option(each, "array") for each in words] == [None, "0-3%2", "0-3%2"]
    assert ["--kill-on-invalid-dep=yes" in each for each in words] == [False, True, True]
    assert all("--parsable" in each for each in words)
    assert (runs / "logs").is_dir(), "Slurm ends a job whose log it cannot open"
    assert "submitted tune: an array of 4 element(s): 102" in said
    assert "cancel:  scancel 101 102 103" in said
    assert "squeue --jobs=101,102,103" in said
    assert [(job["id"], job["stage"]) for job in recorded(runs)] == [
        ("101", "adapt"),
        ("102", "tune"),
        ("103", "evaluate"),
    ]


AWKWARD = "a b;'c' \"d\" $(touch pwned) `touch pwned`, *\ne"


def test_values_arrive_as_they_are(
    submit: Submit, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "x $(touch pwned); 'y', 100%j"
    tune = pipeline_values(tmp_path)["tune"] | {"set": {"prompt.text": AWKWARD}}
    tune["set"]["prompt.initialisation"] = "text"
    submit(directory=str(folder), tune=tune, sbatch=OPTIONS | {"comment": AWKWARD})
    adapt, swept, _ = slurm.submitted
    assert adapt["environment"]["RUN_DIR"] == str(folder / "adapt")
    assert option(adapt["words"], "comment") == AWKWARD
    assert option(adapt["words"], "output") == f"{folder}/logs/adapt-%j.log".replace(
        "100%", "100%%"
    )
    assert f"prompt.text={json.dumps(AWKWARD)}" in swept["words"]
    assert list(tmp_path.glob("**/pwned")) == []


def test_a_dry_run_submits_and_writes_nothing(submit: Submit, slurm: FakeSlurm, runs: Path) -> None:
    said = submit("--dry-run")
    assert "sbatch --parsable" in said
    assert slurm.submitted == []
    assert not runs.exists()


def test_nothing_that_is_done_is_submitted_again(
    submit: Submit, slurm: FakeSlurm, runs: Path
) -> None:
    submit()
    adapted(runs)
    for name in (ELEMENTS[0], ELEMENTS[2]):
        mark(runs / "tune" / name)
    mark(runs / "tune" / ELEMENTS[1], "why", "error: a port was taken")
    said = submit()
    tune, evaluate = (job["words"] for job in slurm.submitted[3:])
    assert option(tune, "array") == "1,3%2"
    assert option(tune, "dependency") is None
    assert option(evaluate, "array") == "0-3%2"
    assert option(evaluate, "dependency") == "afterok:104"
    assert f"adapt: done ({runs / 'adapt'})" in said
    assert "tune     boolq, seed 0: done" in said
    assert "tune     boolq, seed 1: to submit; its last attempt: error: a port was taken" in said


def test_what_waits_or_runs_is_not_submitted_again(
    submit: Submit, slurm: FakeSlurm, runs: Path
) -> None:
    submit()
    adapted(runs)
    mark(runs / "tune" / ELEMENTS[0])
    slurm.control(queue={"102_1": "RUNNING", "102_3": "PENDING"})
    said = submit()
    tune, evaluate = (job["words"] for job in slurm.submitted[3:])
    assert option(tune, "array") == "2%2"
    assert option(evaluate, "dependency") == "afterok:102_1:102_3:104"
    assert "tune     boolq, seed 1: running as 102_1" in said
    assert "tune     cb, seed 1: pending as 102_3" in said
    assert "scancel 102 104 105" in said


def test_all_that_is_left_in_the_queue_is_left_alone(
    submit: Submit, slurm: FakeSlurm, runs: Path
) -> None:
    submit()
    queue = {"101": "RUNNING"} | {f"{job}_{i}": "PENDING" for job in (102, 103) for i in range(4)}
    slurm.control(queue=queue)
    said = submit()
    assert len(slurm.submitted) == 3
    assert "There is nothing to submit" in said
    assert "cancel:  scancel 101 102 103" in said


def test_elements_are_known_by_their_folders_when_the_seeds_change(
    submit: Submit, slurm: FakeSlurm, tmp_path: Path
) -> None:
    """An index means another run than before."""
    tune = pipeline_values(tmp_path)["tune"]
    submit(adapt=None, evaluate=None, tune=tune)
    slurm.control(queue={f"101_{index}": "PENDING" for index in range(4)})
    said = submit(adapt=None, evaluate=None, tune=tune | {"seeds": [5, 0]})
    (_, again) = slurm.submitted
    assert option(again["words"], "array") == "0,2%2"
    assert again["environment"]["SEEDS"] == "5 0"
    assert "tune     cb, seed 0: pending as 101_2" in said


def test_a_run_that_was_stopped_is_refused_with_its_reason(
    submit: Submit, slurm: FakeSlurm, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = mark(runs / "tune" / ELEMENTS[3], "STOP", "3 attempts in a row without progress")
    with pytest.raises(ChecksFailedError, match="tune stopped"):
        submit()
    said = " ".join(capsys.readouterr().out.split())
    assert "cb, seed 1: 3 attempts in a row without progress" in said
    assert f"remove {stop}" in said
    assert slurm.submitted == []


def test_scores_on_another_split_are_not_taken_for_these(
    submit: Submit, slurm: FakeSlurm, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = runs / "tune" / ELEMENTS[0] / "evaluation"
    mark(scores, "results.json", '{"split": "test"}')
    mark(scores)
    with pytest.raises(ChecksFailedError, match="evaluate split"):
        submit()
    assert "has scores on the test split" in capsys.readouterr().out
    submit(evaluate={"split": "test"})
    assert option(slurm.submitted[-1]["words"], "array") == "1-3%2"


def test_what_a_stage_that_is_done_has_read_may_be_gone(
    submit: Submit, slurm: FakeSlurm, runs: Path, tmp_path: Path
) -> None:
    adapted(runs)
    text = tmp_path / "text.txt"
    path = write_pipeline(tmp_path, pipeline_values(tmp_path))
    text.unlink()
    main(["pipeline", str(path)])
    assert len(slurm.submitted) == 2


def test_an_export_that_is_gone_is_missed_before_the_sweep_is_submitted(
    submit: Submit, slurm: FakeSlurm, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(runs / "adapt")
    with pytest.raises(ChecksFailedError, match="tune backbone"):
        submit()
    assert f"remove {runs / 'adapt' / 'DONE'}" in capsys.readouterr().out


def test_a_check_that_fails_submits_nothing(submit: Submit, slurm: FakeSlurm) -> None:
    slurm.control(refuses_test=["evaluate"])
    with pytest.raises(ChecksFailedError, match="evaluate sbatch"):
        submit()
    assert slurm.submitted == []


def test_a_refusal_in_the_middle_names_what_was_submitted(
    submit: Submit, slurm: FakeSlurm, runs: Path
) -> None:
    slurm.control(refuses=["evaluate"])
    with pytest.raises(SoftpromptError) as caught:
        submit()
    said = str(caught.value)
    assert caught.value.exit_code != 0
    assert "Requested node configuration is not available" in said
    assert "101 (adapt), 102 (tune)" in said
    assert "scancel 101 102" in said
    assert len(recorded(runs)) == 2
    queue = {"101": "RUNNING"} | {f"102_{index}": "PENDING" for index in range(4)}
    slurm.control(queue=queue)
    submit()
    (evaluate,) = slurm.submitted[2:]
    assert option(evaluate["words"], "dependency") == "afterok:102_0:102_1:102_2:102_3"


def test_a_job_that_slurm_has_forgotten_is_submitted_again(
    submit: Submit, slurm: FakeSlurm, runs: Path
) -> None:
    """squeue fails for a single job of which it does not know any more."""
    submit(tune=None, evaluate=None)
    record = runs / "pipeline.json"
    record.write_text(record.read_text().replace('"101"', '"100"'))
    submit(tune=None, evaluate=None)
    assert len(slurm.submitted) == 2


def test_a_queue_that_does_not_answer_submits_nothing_twice(
    submit: Submit, slurm: FakeSlurm
) -> None:
    submit()
    (slurm.folder / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm' >&2; exit 1\n")
    with pytest.raises(SlurmError, match="Unable to contact slurm"):
        submit()
    assert len(slurm.submitted) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"jobs": [{"id": 3}]}', '{"jobs": [1]}'])
def test_a_damaged_record_is_not_overwritten(
    text: str, submit: Submit, slurm: FakeSlurm, runs: Path
) -> None:
    record = mark(runs, "pipeline.json", text)
    with pytest.raises(ConfigError, match="squeue --me"):
        submit()
    assert record.read_text() == f"{text}\n"
    assert slurm.submitted == []


def test_a_directory_that_cannot_be_written_submits_nothing(
    submit: Submit, slurm: FakeSlurm, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        submit(directory=str(tmp_path / "file" / "x"))
    assert slurm.submitted == []


def test_without_sbatch_it_says_where_there_is_one(
    submit: Submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ChecksFailedError, match="sbatch"):
        submit()
    assert "Nothing was submitted" in submit("--dry-run")
