"""Drills on the files of a run, in this process: a run is cut short, its files suffer, it resumes.

A kill is an exception here that nothing catches: no code of ours runs afterwards either way. Real
kills are in test_kills.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist import durable
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import CheckpointError, NonFiniteLossError, StoppedError
from softprompt_dist.lifecycle import attempt as attempt_module
from softprompt_dist.lifecycle import beside, ownership
from softprompt_dist.parallel import stop
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import checkpoint as checkpoint_module
from softprompt_dist.run import checkpoint_format, loop
from softprompt_dist.run.saved_state import TuningState
from softprompt_dist.run.session import train
from softprompt_dist.run.tuning import TuningRun
from tests import runs
from tests.damage import disk_full, flip_bit, truncate

Tune = Callable[..., Path]
LAST = 12


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second of waiting in each of many attempts."""
    monkeypatch.setattr(ownership, "_SETTLING_SECONDS", 0.0)
    monkeypatch.setattr(attempt_module, "_LOOK_SECONDS", 0.0)


@pytest.fixture
def tune(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """`tune(name, *overrides, die_before=step)`: a run of 12 steps with dropout, or a part."""

    def run(name: str, *overrides: str, die_before: int | None = None, fresh: bool = False) -> Path:
        settings = [f"run_directory={tmp_path / name}", f"steps={LAST}", "evaluation.every_steps=6"]
        settings += ["checkpoint.every_steps=2", "backbone.dropout=0.2"]
        config = load_recipe(TuneConfig, tiny_recipe, [*settings, *overrides])
        with monkeypatch.context() as patch:
            if die_before is not None:
                patch.setattr(loop, "learning_rate_at", _deadly(die_before))
            with suppress(Killed):
                train(config, fresh=fresh)
        return tmp_path / name

    return run


def _deadly(step: int) -> Callable[..., float]:
    real = loop.learning_rate_at

    def rate(config: object, steps_done: int) -> float:
        if steps_done + 1 == step:
            raise Killed
        return real(config, steps_done)

    return rate


@pytest.fixture(scope="module")
def undisturbed(
    tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, list[int]]]:
    """Directory of the run that nothing befell, and the examples of each of its steps."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = [f"run_directory={folder}", f"steps={LAST}", "evaluation.every_steps=6"]
    settings += ["checkpoint.every_steps=2", "backbone.dropout=0.2"]
    with pytest.MonkeyPatch.context() as patch:
        used = record_examples(patch)
        train(load_recipe(TuneConfig, tiny_recipe, settings))
    return folder, used


def record_examples(patch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Step -> the examples of its last update; the dictionary fills while runs go on."""
    used: dict[int, list[int]] = {}
    real = TuningRun.batches

    def batches(self: TuningRun, consumed: int) -> object:
        size = self.config.batch.global_batch_size
        used[consumed // size + 1] = [int(i) for _, i in self.order.pairs(consumed, size)]
        return real(self, consumed)

    patch.setattr(TuningRun, "batches", batches)
    return used


def assert_same_end(run_dir: Path, reference: Path) -> None:
    for name in ("state.safetensors", "rng.safetensors"):
        ours, theirs = (runs.checkpoint_folder(d, LAST) / name for d in (run_dir, reference))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert runs.metrics_without_time(run_dir) == runs.metrics_without_time(reference)
    best = "prompt/best.safetensors"
    assert (run_dir / best).read_bytes() == (reference / best).read_bytes()


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def swap_names(run_dir: Path) -> None:
    older, newer = sorted((run_dir / "checkpoints").glob("step-*"))[-2:]
    aside = older.with_name("aside")
    older.rename(aside)
    newer.rename(older)
    aside.rename(newer)


def take_from_another_run(run_dir: Path) -> None:
    file = newest(run_dir) / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f"  # whole and well-formed, of other numbers
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "flipped bit": (lambda run: flip_bit(newest(run) / "state.safetensors"), 4),
    "truncated": (lambda run: truncate(newest(run) / "rng.safetensors"), 4),
    "missing tensors": (lambda run: (newest(run) / "state.safetensors").unlink(), 4),
    "missing manifest": (lambda run: (newest(run) / "manifest.json").unlink(), 4),
    "step gone": (lambda run: (run / "step").unlink(), 6),
    "step is garbage": (lambda run: (run / "step").write_text("\x00../../etc\n"), 6),
    "names swapped": (swap_names, 2),
    "another run's tensors": (take_from_another_run, 4),
}
"""What is done to a run after six steps -> the step that it resumes from."""


@pytest.mark.drill("D7")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_end_is_the_same(
    tune: Tune, undisturbed: tuple[Path, object], damage: str, drilled: Callable[..., None]
) -> None:
    run_dir = tune("run", die_before=7)
    inflict, resumes_from = DAMAGE[damage]
    inflict(run_dir)
    started = time.perf_counter()
    tune("run")
    drilled(steps_redone=6 - resumes_from, seconds=time.perf_counter() - started)
    assert_same_end(run_dir, undisturbed[0])
    set_aside = list((run_dir / "checkpoints").glob("corrupt-*"))
    assert len(set_aside) == (6 - resumes_from) // 2


@pytest.mark.drill("D8")
@pytest.mark.parametrize("remains", ["damaged ones", "nothing"])
def test_without_a_valid_checkpoint_nothing_starts_over(tune: Tune, remains: str) -> None:
    run_dir = tune("run", die_before=7)
    if remains == "nothing":
        shutil.rmtree(run_dir / "checkpoints")
    else:
        for file in run_dir.glob("checkpoints/step-*/state.json"):
            truncate(file)
    with pytest.raises(CheckpointError, match="--fresh"):
        tune("run")
    assert (run_dir / "why").read_text().startswith("fatal: ")
    assert not (run_dir / "DONE").exists()
    tune("run", fresh=True)
    assert (run_dir / "DONE").read_text() == f"{LAST}\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("a file system cannot be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.drill("D9")
def test_a_full_disk_ends_the_run_with_the_numbers_and_the_old_ones_intact(
    tiny_recipe: Path, small_disk: Path
) -> None:
    settings = [f"run_directory={small_disk / 'run'}", f"steps={LAST}", "checkpoint.every_steps=2"]
    config = load_recipe(TuneConfig, tiny_recipe, [*settings, "checkpoint.keep_last=9"])
    filler = small_disk / "filler"
    real = loop.learning_rate_at

    def fill_before_step_7(settings: object, steps_done: int) -> float:
        if steps_done == 6:
            free = os.statvfs(small_disk)
            filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 8192))
        return real(settings, steps_done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate_at", fill_before_step_7)
        with pytest.raises(CheckpointError) as refused:
            train(config)
    assert "bytes, " in str(refused.value)
    assert "are free there" in str(refused.value)
    run_dir = small_disk / "run"
    published = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert published == ["step-00000002", "step-00000004", "step-00000006"]
    assert (run_dir / "why").read_text().startswith("fatal: ")
    filler.unlink()
    train(config)
    assert (run_dir / "DONE").is_file()


@pytest.mark.drill("D39")
def test_a_network_disk_that_is_away_now_and_then_costs_nothing(
    tune: Tune, undisturbed: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_FIRST_PAUSE_SECONDS", 0.001)

    def is_away(name: str, is_meant: Callable[..., bool], call: Callable[[int], bool]) -> None:
        real, calls = getattr(Path, name), iter(range(10_000))

        def method(path: Path, *given: object, **named: object) -> object:
            if is_meant(path, *given) and call(next(calls)):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return real(path, *given, **named)

        monkeypatch.setattr(Path, name, method)

    is_away("read_bytes", lambda path: path.name == "attempt.json", lambda n: n // 6 % 2 == 1)
    is_away("rename", lambda path, _: path.name.startswith(".tmp-step"), lambda n: n % 3 < 2)
    is_away("open", lambda path, mode="r": mode == "a", lambda n: n % 4 == 0)
    is_away("iterdir", lambda path: path.name == "checkpoints", lambda n: n % 2 == 0)
    run_dir = tune("run")
    assert_same_end(run_dir, undisturbed[0])
    assert (run_dir / "DONE").read_text() == f"{LAST}\n"


@pytest.mark.drill("D39")
def test_a_disk_that_hangs_keeps_nobody_from_training_until_the_next_save(
    tune: Tune, undisturbed: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, answers = threading.Event(), threading.Event()
    rate, read_bytes, open_file = loop.learning_rate_at, Path.read_bytes, Path.open

    def waits(is_meant: bool) -> None:
        if is_meant and hangs.is_set():
            assert answers.wait(60)

    def read(path: Path) -> bytes:
        waits(path.name == "attempt.json")
        return read_bytes(path)

    def opened(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        waits(mode == "a")
        return open_file(path, mode, *given, **named)

    def rate_at(settings: object, steps_done: int) -> float:
        if steps_done == 7:
            hangs.set()
        if steps_done == 11:  # so four steps were made meanwhile
            assert not answers.is_set()
            answers.set()
        return rate(settings, steps_done)

    monkeypatch.setattr(beside, "_SECONDS", 0.05)
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(loop, "learning_rate_at", rate_at)
    assert_same_end(tune("run", "checkpoint.every_steps=6"), undisturbed[0])


@pytest.mark.drill("D7", "D39")
def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_damaged(
    tune: Tune, undisturbed: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tune("run", die_before=7)
    monkeypatch.setattr(durable, "_FIRST_PAUSE_SECONDS", 0.001)
    real, calls = checkpoint_format.read_bounded, iter(range(10_000))

    def read_bounded(path: Path, limit: int) -> bytes:
        if path.name == "state.safetensors" and next(calls) < 3:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, limit)

    monkeypatch.setattr(checkpoint_format, "read_bounded", read_bounded)
    tune("run")
    assert not list((run_dir / "checkpoints").glob("corrupt-*"))
    assert_same_end(run_dir, undisturbed[0])


@pytest.mark.drill("D14")
@pytest.mark.parametrize(
    ("disk", "said"), [("sound", "is saved"), ("full", "could not be saved: .*No space left")]
)
def test_a_nan_after_a_validation_that_was_made_up_for_is_the_reason(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, said: str
) -> None:
    validate = loop.validate

    def stopped(run: TuningRun, state: TuningState, records: loop.Records) -> None:
        if state.step == 0:
            validate(run, state, records)
            return
        os.kill(os.getpid(), signal.SIGUSR2)
        raise StoppedError("in the middle of a validation")

    def not_finite(*_: object, **__: object) -> None:
        raise NonFiniteLossError("the loss is nan.")

    stop.listen()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", stopped)
        with pytest.raises(StoppedError, match="after step 6, which is saved"):
            tune("run")
    stop.forget()
    saved = newest(tmp_path / "run") / "state.safetensors"
    before = saved.read_bytes()
    if disk == "full":
        monkeypatch.setattr(checkpoint_module, "patiently", disk_full)
    monkeypatch.setattr(loop, "accumulate_gradient", not_finite)
    reason = f"Step 7: the loss is nan. The state after step 6 {said}"
    with pytest.raises(NonFiniteLossError, match=reason):
        tune("run")
    assert re.match(f"fatal: {reason}", (tmp_path / "run" / "why").read_text())
    assert saved.read_bytes() == before


@pytest.mark.drill("D16")
@pytest.mark.parametrize("parts", [[7], range(2, LAST + 1)], ids=["two halves", "twelve parts"])
def test_a_run_in_parts_is_the_whole_run(
    tune: Tune,
    undisturbed: tuple[Path, object],
    parts: Sequence[int],
    drilled: Callable[..., None],
) -> None:
    for step in parts:
        tune("run", "checkpoint.every_steps=1", "checkpoint.keep_last=20", die_before=step)
    run_dir = tune("run", "checkpoint.every_steps=1", "checkpoint.keep_last=20")
    drilled(steps_redone=0)
    assert_same_end(run_dir, undisturbed[0])


@pytest.mark.drill("D16")
def test_a_resume_without_random_states_would_be_noticed(
    tune: Tune, undisturbed: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune("run", die_before=7)
    monkeypatch.setattr(checkpoint_module, "restore_random_state", lambda state: None)
    run_dir = tune("run")
    with pytest.raises(AssertionError):
        assert_same_end(run_dir, undisturbed[0])


@pytest.mark.drill("D17", "D20")
def test_kills_over_an_epoch_s_edge_use_each_example_as_often(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, drilled: Callable[..., None]
) -> None:
    long = ["steps=24", "evaluation.every_steps=24", "checkpoint.keep_last=1"]
    with monkeypatch.context() as patch:
        expected = record_examples(patch)
        tune("whole", *long)
    used = record_examples(monkeypatch)
    redone = []
    for step in (6, 12, 20, 21):
        run_dir = tune("run", *long, die_before=step)
        (kept,) = (run_dir / "checkpoints").glob("step-*")
        redone.append(step - 1 - int(kept.name.removeprefix("step-")))
    tune("run", *long)
    drilled(steps_redone=max(redone))
    assert max(redone) == 1
    assert used == expected
    in_order = [i for step in sorted(used) for i in used[step]]
    assert sorted(in_order[:150]) == list(range(150))  # an epoch, which ends within step 19


@pytest.mark.drill("D37")
def test_checkpoints_are_chosen_by_step_whatever_the_clock_said(
    tune: Tune, undisturbed: tuple[Path, object]
) -> None:
    run_dir = tune("run", die_before=7)
    for age, folder in enumerate(sorted((run_dir / "checkpoints").glob("step-*"))):
        os.utime(folder, (4e9 - age * 1e8, 4e9 - age * 1e8))  # the oldest looks newest, and to come
    tune("run")
    assert_same_end(run_dir, undisturbed[0])
    assert json.loads((run_dir / "heartbeat.json").read_text())["ended"]


@pytest.mark.drill("D38")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=6", "seed: saved 5, now 6"),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate: saved 0.3, now 0.1"),
        ("task.max_examples=20", "task.max_examples: saved None, now 20"),
    ],
)
def test_another_recipe_does_not_continue_a_run(tune: Tune, override: str, said: str) -> None:
    run_dir = tune("run", die_before=5)
    before = (run_dir / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another run") as refused:
        tune("run", override)
    assert said in str(refused.value)
    assert (run_dir / "config.yaml").read_bytes() == before
    assert (run_dir / "why").read_text().startswith("fatal: ")
