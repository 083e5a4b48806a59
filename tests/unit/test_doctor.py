from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from softprompt_dist import doctor
from softprompt_dist.doctor import TESTED_VERSIONS, Finding, check_versions, table

REPOSITORY = Path(__file__).parents[2]


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def test_tested_versions_are_those_of_the_constraints_file() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([^\s;]+)", constraints, flags=re.MULTILINE))
    assert TESTED_VERSIONS.items() <= pinned.items()


def test_versions_as_tested_are_ok() -> None:
    local = {name: f"{version}+cpu" for name, version in TESTED_VERSIONS.items()}
    assert set(statuses(check_versions(local.__getitem__)).values()) == {"ok"}


def test_other_versions_warn_and_missing_or_unsafe_ones_fail() -> None:
    def version_of(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.9.1", "transformers": "4.57.0"}.get(name, TESTED_VERSIONS[name])

    findings = check_versions(version_of)
    found = statuses(findings)
    assert (found["deepspeed"], found["torch"], found["transformers"]) == ("fail", "fail", "warn")
    assert all(finding.remedy for finding in findings if finding.status != "ok")


def test_a_dead_builder_s_lock_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert statuses(doctor.check_build_locks()) == {"build locks": "ok"}
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (finding,) = doctor.check_build_locks()
    assert finding.status == "fail"
    assert f"rm '{lock}'" in finding.remedy
    with lock.open():
        assert doctor.check_build_locks()[0].status == "warn"


def test_folders_are_tried_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.check_folder("run directory", tmp_path / "not" / "yet")
    assert finding.status == "ok"
    assert list(tmp_path.iterdir()) == []

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("softprompt_dist.durable.replace_file", full)
    (finding,) = doctor.check_folder("run directory", tmp_path)
    assert finding.status == "fail"
    assert "No space left" in finding.found


@pytest.mark.parametrize(("status", "code"), [("ok", None), ("warn", None), ("fail", 1)])
def test_exit_code_tells_whether_a_check_failed(
    status: str,
    code: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    collective = Finding("collective", status, "measured", "" if status == "ok" else "do this")
    monkeypatch.setattr(doctor, "machine_findings", lambda run_directory: [])
    monkeypatch.setattr(doctor, "check_collective", lambda debug: [collective])
    try:
        doctor.main(["--run-dir", str(tmp_path)])
        found = None
    except SystemExit as ended:
        found = ended.code
    assert found == code
    assert re.search(rf"^{status} +collective +measured$", capsys.readouterr().out, re.MULTILINE)


def test_table_puts_the_remedy_below_its_finding() -> None:
    text = table([Finding("cores", "ok", "2"), Finding("memory", "warn", "1 GiB", "Close some.")])
    assert [line.split() for line in text.splitlines()] == [
        ["ok", "cores", "2"],
        ["warn", "memory", "1", "GiB"],
        ["->", "Close", "some."],
    ]
