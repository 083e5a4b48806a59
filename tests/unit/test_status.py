from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist import status
from softprompt_dist.lifecycle.ownership import Owner
from softprompt_dist.lifecycle.status import read_status
from tests.messages import Said, assert_message

OURS = Owner.here({})
DEAD = replace(OURS, started=OURS.started - 1)
THERE = replace(OURS, host="node7", place="there", pid=12, job="4711")


class Run:
    """Writes what a run leaves in its directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: object, seconds_ago: float = 0.0) -> Run:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.path / name).write_text(text)
        then = time.time() - seconds_ago
        os.utime(self.path / name, (then, then))
        return self

    def owned_by(self, owner: Owner) -> Run:
        return self.write("attempt.json", asdict(owner)).write("why", "running\n")

    def beats(self, seconds_ago: float = 0.0, **values: Any) -> Run:
        known = {"token": OURS.token, "verb": "train", "name": "demo", "step": 400, "steps": 1000}
        known |= {"loss": 0.25, "tokens_per_second": 12_345.6, "doing": "step 401"}
        known |= {"silent_seconds": 0.1, "limit_seconds": 240.0, "heartbeat_seconds": 5.0}
        return self.write("heartbeat.json", known | values, seconds_ago)

    def logs(self, first: int, last: int, seconds_per_step: float, spikes: tuple[int, ...]) -> Run:
        lines = [
            {"step": step, "kind": "train", "time": step * seconds_per_step, "loss": 1.0}
            | ({"loss_spike_sigmas": 9.0} if step in spikes else {})
            for step in range(first, last + 1)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return self.write("metrics.jsonl", text + '{"step": 9, "ki')

    def saves(self, step: int, seconds_ago: float = 0.0, is_whole: bool = True) -> Run:
        folder = Run(self.path / "checkpoints" / f"step-{step:08d}").write("state.json", "12345")
        size = 5 if is_whole else 6
        manifest = {"step": step, "files": {"state.json": {"bytes": size, "sha256": ""}}}
        folder.write("manifest.json", manifest, seconds_ago)
        return self


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


Asked = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asked(said: Said) -> Asked:
    """`asked(directory, ...)`: exit code, and what is printed."""
    return lambda *arguments: said(status.main, *arguments)


def test_a_living_run_on_one_screen(run: Run, asked: Asked) -> None:
    run.owned_by(OURS).beats(straggler="rank 1 on node2, 1.8 x").saves(400, seconds_ago=35)
    run.logs(1, 400, seconds_per_step=0.5, spikes=(310, 390))
    run.write("environment.json", {"attempts": [{}, {}]})
    (run.path / "stacks").mkdir()
    assert "stacks" not in asked(run.path)[1], "a batch script has made it, and no rank has hung"
    (run.path / "stacks" / "rank-0.txt").touch()
    code, out, err = asked(run.path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{run.path}  (train, demo)",
        f"  running        process {OURS.pid} on {OURS.host}, step 401.",
        "  step           400 of 1000 (40 %), loss 0.25, 12,346 tokens/s, about 0:05:00 left",
        "  checkpoint     step 400, 35 s old, whole",
        "  attempts       2",
        "  straggler      rank 1 on node2, 1.8 x",
        "  loss spikes    2, the last at step 390",
        f"  look at        {run.path / 'stacks'}, {run.path / 'metrics.jsonl'}",
    ]


@pytest.mark.parametrize(
    ("prepare", "state", "code", "part"),
    [
        (lambda run: run.owned_by(OURS).beats(), "running", 0, "step 401"),
        (
            lambda run: run.owned_by(OURS).beats().write("STOP", "enough"),
            "running",
            0,
            "STOP asks it to end",
        ),
        (
            lambda run: run.owned_by(THERE).beats(20, token=THERE.token),
            "running",
            0,
            "Slurm job 4711, process 12 on node7",
        ),
        (lambda run: run.owned_by(OURS), "starting", 0, "has just begun"),
        (lambda run: run.write("why", "running\n"), "starting", 0, "have not met"),
        (
            lambda run: run.owned_by(OURS).beats(silent_seconds=70, doing="step 402"),
            "silent",
            1,
            "no progress for 70 s while step 402; it ends itself after 4 min",
        ),
        (lambda run: run.owned_by(OURS).beats(100), "silent", 1, "has not beaten for 100 s"),
        (lambda run: run.owned_by(DEAD).beats(), "dead", 1, "without a word. The same command"),
        (
            lambda run: run.owned_by(THERE).beats(70, token=THERE.token),
            "dead",
            1,
            "process 12 on node7 is gone",
        ),
        (lambda run: run.write("why", "running\n", 600), "dead", 1, "killed, or by a bug"),
        (
            lambda run: run.write("why", "signal: SIGTERM after step 15, which is saved.\n"),
            "stopped",
            1,
            "SIGTERM after step 15, which is saved. The same command goes on",
        ),
        (
            lambda run: run.write("why", "stop: STOP file after step 15.").write(
                "STOP", "enough\n"
            ),
            "stopped",
            1,
            "STOP: enough. Remove ",
        ),
        (lambda run: run.write("STOP", ""), "stopped", 1, "no reason given"),
        (lambda run: run.write("why", "fatal: steps is 0"), "failed", 1, "fatal: steps is 0"),
        (lambda run: run.write("why", "error: a port"), "failed", 1, "error: a port"),
        (
            lambda run: run.owned_by(DEAD).beats().write("why", "hang: Rank 3 made no"),
            "failed",
            1,
            "hang: Rank 3",
        ),
        (lambda run: run.write("DONE", "30\n").write("why", "done"), "done", 0, "at step 30"),
        (lambda run: run.write("config.yaml", "name: x"), "never started", 1, "No attempt"),
        (lambda run: run.saves(30), "dead", 1, "neither a heartbeat nor a word"),
    ],
)
def test_each_state_has_its_word_and_exit_code(  # noqa: PLR0913 - two of them are fixtures
    run: Run, asked: Asked, prepare: Callable[[Run], object], state: str, code: int, part: str
) -> None:
    prepare(run)
    found, out, err = asked(run.path)
    assert found == code
    assert out.splitlines()[1].startswith(f"  {state} ")
    assert part in out
    assert ("Neither done nor alive" in err) == (code == 1)


def test_a_checkpoint_that_lacks_bytes_is_damaged(run: Run, asked: Asked) -> None:
    run.saves(200).saves(400, is_whole=False).write("DONE", "400\n")
    assert "step 400: DAMAGED; the run goes on from the one before" in asked(run.path)[1]
    (run.path / "checkpoints" / "step-00000400" / "manifest.json").unlink()
    assert "step 400: DAMAGED" in asked(run.path)[1]


def test_spikes_are_counted_by_the_run_and_not_by_reading_all_its_metrics(
    run: Run, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.owned_by(OURS).beats().logs(1, 3000, 0.5, spikes=(7, *range(2970, 2990)))
    metrics, opened, sizes = run.path / "metrics.jsonl", Path.open, list[int]()

    class Counted(io.FileIO):
        def read(self, size: int | None = -1, /) -> Any:
            sizes.append(len(content := super().read(size)))
            return content

    def counting(path: Path, *arguments: Any, **settings: Any) -> Any:
        return Counted(path) if path == metrics else opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", counting)
    assert "loss spikes    20, the last at step 2989" in asked(run.path)[1], "of the latest steps"
    run.beats(loss_spikes=21, last_loss_spike_step=2989)
    assert "loss spikes    21, the last at step 2989" in asked(run.path)[1]
    assert 0 < sum(sizes) < metrics.stat().st_size


def test_several_runs_are_a_table(tmp_path: Path, asked: Asked) -> None:
    Run(tmp_path / "a").owned_by(OURS).beats().logs(1, 400, 0.5, ()).saves(300)
    Run(tmp_path / "b").write("why", f"fatal: {'x' * 200}")
    code, out, err = asked(tmp_path / "a", tmp_path / "b")
    header, first, second = out.splitlines()
    assert header.split() == ["run", "state", "step", "loss", "tokens/s", "left", "checkpoint"]
    assert " ".join(first.split()[1:9]) == "running 400 of 1000 0.25 12,346 0:05:00 300"
    assert second.split()[1] == "failed"
    assert second.endswith("x...")
    assert code == 1
    assert str(tmp_path / "b") in err
    assert f"{tmp_path / 'a'}" not in err


def test_programs_get_json(run: Run, asked: Asked) -> None:
    run.owned_by(THERE).beats(token=THERE.token, loss=float("nan")).saves(400)
    (found,) = json.loads(asked(run.path, "--json")[1])
    assert (found["state"], found["step"], found["steps"]) == ("running", 400, 1000)
    assert (found["job"], found["host"], found["pid"]) == ("4711", "node7", 12)
    assert found["loss"] is None, "NaN is no JSON"
    assert found["checkpoint"]["is_whole"] is True


@pytest.mark.parametrize(
    ("states", "state", "part"),
    [
        (("done", "running"), "running", "span-corruption: process"),
        (("done", "failed"), "failed", "span-corruption: fatal: x"),
        (("done", "done"), "done", "Complete"),
        (("done", "never started"), "stopped", "What comes after it has not begun"),
        (("never started", "never started"), "never started", "No attempt"),
    ],
)
def test_an_adaptation_is_as_its_stages(
    tmp_path: Path, asked: Asked, states: tuple[str, ...], state: str, part: str
) -> None:
    make: dict[str, Callable[[Run], object]] = {
        "done": lambda run: run.write("DONE", "9\n"),
        "running": lambda run: run.owned_by(OURS).beats(),
        "failed": lambda run: run.write("why", "fatal: x"),
        "never started": lambda run: run.write("config.yaml", ""),
    }
    for name, each in zip(("prefix-lm", "span-corruption"), states, strict=True):
        make[each](Run(tmp_path / "adapted" / name))
    _, out, _ = asked(tmp_path / "adapted")
    lines = out.splitlines()
    assert lines[1].startswith(f"  {state} ")
    assert part in lines[1]
    assert [line.split("  ")[0].rpartition("/")[2] for line in lines[-2:]] == [
        "prefix-lm",
        "span-corruption",
    ]


def test_one_attempt_at_all_stages_speaks_for_them(tmp_path: Path, asked: Asked) -> None:
    whole = Run(tmp_path / "run").owned_by(OURS)
    whole.beats(verb="adapt", stage="run-b", step=140, steps=200, doing="step 41")
    first = Run(tmp_path / "run" / "a").write("config.yaml", "").logs(1, 100, 1.0, ()).saves(100)
    Run(first.path / "export").write("config.json", "{}")
    Run(tmp_path / "run" / "b").write("config.yaml", "").logs(1, 40, 2.0, (33,)).saves(30)
    Run(tmp_path / "run" / "c").write("config.yaml", "")
    code, out, _ = asked(whole.path)
    assert code == 0
    assert "140 of 200 (70 %), loss 0.25, 12,346 tokens/s, about 0:02:00 left" in out
    assert "loss spikes    1, the last at step 33" in out
    assert "checkpoint     none" not in out
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert [row[1] for row in rows] == ["done", "running", "never"]
    assert rows[1][2:5] == ["40", "1", "30"]


def test_what_is_no_run_is_said_with_a_remedy(tmp_path: Path, asked: Asked) -> None:
    assert_message(
        asked(tmp_path / "missing"), tmp_path / "missing", "is no directory", "--run-dir"
    )
    (tmp_path / "empty").mkdir()
    assert_message(asked(tmp_path / "empty"), tmp_path / "empty", "holds no run", "config.yaml")


def test_asking_is_not_an_attempt(run: Run, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_OUTCOME", str(run.path))
    run.write("why", "running\n", 600)
    asked(run.path)
    asked(run.path / "missing")
    assert (run.path / "why").read_text() == "running\n"


@pytest.mark.parametrize("name", ["heartbeat.json", "attempt.json", "environment.json", "why"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": "x", "files": 3}', "\x00"])
def test_files_that_are_torn_end_no_question(run: Run, name: str, content: str) -> None:
    run.saves(3).write(name, content)
    (run.path / "checkpoints" / "step-00000003" / "manifest.json").write_text(content)
    found = read_status(run.path)
    assert found is not None
    assert found.to_json()["step"] == 3


def test_a_directory_that_may_not_be_written_is_only_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    run.owned_by(THERE).beats(10, token=THERE.token)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError

    for name in ("touch", "write_bytes", "write_text", "mkdir", "rename"):
        monkeypatch.setattr(Path, name, denied)
    assert asked(run.path)[0] == 0


def test_torch_is_not_waited_for() -> None:
    code = (
        "import sys, softprompt_dist.status, softprompt_dist.lifecycle.status; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
