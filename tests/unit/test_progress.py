"""Work that takes long is told about: how much of it is done, and what time is left."""

from __future__ import annotations

import io
import re
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softprompt_dist import convert, corpus, evaluate, predict, progress
from softprompt_dist.adaptation import session as adapt_session
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.lm import text_sources
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import session
from tests import adaptations, corpora, runs
from tests.prompts import save_untuned

LINE = re.compile(r"(?P<what>.+): (?P<done>[\d.]+)(?:/(?P<total>[\d.]+))? ?\w*, .+ (left|so far)")


WATCH = progress._Speaker._watch


class Screen(io.StringIO):
    """A stderr that knows at what time each line came."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.said: list[tuple[float, str]] = []
        self.seconds_a_look = 0.0
        self.num_threads = 0

    def write(self, text: str) -> int:
        self.said += [(self.now, line) for line in text.splitlines() if line.strip()]
        return len(text)

    def count_thread(self) -> None:
        self.num_threads += 1

    def clock(self) -> float:
        self.now += self.seconds_a_look
        return self.now

    @property
    def lines(self) -> list[str]:
        return [line for _, line in self.said]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    shown = Screen()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=shown))
    monkeypatch.setattr(progress, "monotonic", shown.clock)
    monkeypatch.setattr(progress, "_speaker", progress._Speaker())
    # No thread: the clock does not go by itself, either.
    monkeypatch.setattr(progress._Speaker, "_watch", lambda self: shown.count_thread())
    return shown


def test_a_line_every_five_seconds_says_how_much_is_done_and_what_time_is_left(
    screen: Screen,
) -> None:
    with progress.phase("scoring", 600, "rows") as told:
        for _ in range(60):
            screen.now += 1
            told.advance(10)
    times = [time - 1000 for time, _ in screen.said]
    assert times == [*range(5, 61, 5)]
    assert screen.lines[0] == "scoring: 50/600 rows, 55 s left"
    assert screen.lines[-2] == "scoring: 550/600 rows, 5.0 s left"
    assert screen.lines[-1] == "scoring: 600/600 rows, 60 s so far"


def test_short_phases_one_after_another_are_not_silent_together(screen: Screen) -> None:
    for number in range(20):
        for _ in progress.counted("abc", f"phase {number}", "letters"):
            screen.now += 1
    times = [time for time, _ in screen.said]
    assert max(later - earlier for earlier, later in pairwise([1000.0, *times])) <= 6


def test_what_does_not_advance_is_told_of_all_the_same(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EnoughError(Exception):
        """Ends the thread's loop."""

    def sleep(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            return really_sleep(seconds)  # the thread of an earlier test
        screen.now += seconds
        if screen.now > 1020:
            raise EnoughError
        return None

    really_sleep = progress.time.sleep
    monkeypatch.setattr(progress.time, "sleep", sleep)
    with progress.phase("loading"), progress.phase("building an extension"):
        assert screen.num_threads == 1
        with pytest.raises(EnoughError):
            WATCH(progress._speaker)
    assert screen.said == [
        (1008.0, "building an extension: 8.0 s so far"),
        (1016.0, "building an extension: 16 s so far"),
    ]
    progress._speaker.break_silence()
    assert len(screen.said) == 2, "nothing is being done any more"


def test_what_else_is_said_counts(screen: Screen) -> None:
    with progress.phase("training"):
        for _ in range(10):
            screen.now += 7
            progress.spoke()
            progress._speaker.break_silence()
    assert screen.said == []


def test_bytes_are_told_in_a_unit_that_suits_them(screen: Screen) -> None:
    with progress.phase("loading weights", 22.3e9, "B") as told:
        screen.now += 6
        told.advance(1.2e9)
        screen.now += 6
    assert screen.lines[0] == "loading weights: 1.20/22.30 GB, 106 s left"


def test_only_rank_0_speaks(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for _ in progress.counted("abc", "reading", "letters"):
        screen.now += 10
    assert screen.said == []


@pytest.mark.parametrize("state", ["closed", "broken", "none"])
def test_a_stderr_that_is_gone_ends_nothing(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    gone: Any = {"closed": io.StringIO(), "broken": Broken(), "none": None}[state]
    if state == "closed":
        gone.close()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=gone))
    done = []
    for letter in progress.counted("abc", "reading", "letters"):
        screen.now += 10
        done.append(letter)
    assert done == ["a", "b", "c"]


def test_a_terminal_has_a_bar_that_goes_when_the_work_is_done(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setattr(progress, "_BAR_DELAY_SECONDS", 0)
    with progress.phase("scoring", 600, "rows") as told:
        told.advance(150, "fast")
        screen.now += 10
        progress._speaker.break_silence()
        assert "scoring:  25%" in screen.lines[-1]
        assert "150/600" in screen.lines[-1]
        assert "fast" in screen.lines[-1]


def assert_told(screen: Screen, *phases: str) -> None:
    """Of each phase some line says how much of it is done, and of most what time is left."""
    told = {match["what"]: line for line in screen.lines if (match := LINE.fullmatch(line))}
    lacking = [what for what in phases if what not in told]
    assert lacking == [], "\n".join(screen.lines)
    for what in phases:
        lines = [line for line in screen.lines if line.startswith(f"{what}: ")]
        assert any("/" in line and line.endswith(" left") for line in lines), lines


@pytest.fixture
def slow(screen: Screen, lone_process: None) -> Screen:
    """Whatever is counted takes long: a look at the clock is three seconds."""
    screen.seconds_a_look = 3.0
    return screen


def test_train_tells_of_all_that_it_does(slow: Screen, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [f"run_directory={tmp_path / 'run'}", "steps=2", "evaluation.every_steps=1"]
    session.train(load_recipe(TuneConfig, tiny_recipe, settings))
    assert_told(
        slow,
        "loading weights",
        "checking the weights",
        "summing up the weights",
        "scoring the untuned prompt, foods test",
        "validating step 1, foods",
        "scoring the tuned prompt, foods test",
    )
    assert any(line.startswith("reading the train split: ") for line in slow.lines)


def test_evaluate_and_predict_tell_how_many_rows_are_answered(
    slow: Screen, lively_t5: Path, tiny_data: Path, tmp_path: Path
) -> None:
    prompt = save_untuned(tmp_path, runs.tiny_recipe(lively_t5, tiny_data))
    evaluate.main(["--prompt", str(prompt)])
    assert_told(slow, "scoring the prompt, foods test", "bootstrap intervals")
    rows = ["--input", str(tiny_data / "test.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    predict.main(["--prompt", str(prompt), *rows])
    assert_told(slow, "loading weights", "answering rows 1 to 21")


def test_convert_tells_how_many_bytes_are_written_and_checked(
    slow: Screen, tiny_t5: Path, tmp_path: Path
) -> None:
    options = ["--output", str(tmp_path / "copy"), "--precision", "bf16"]
    convert.main(["--backbone", str(tiny_t5), *options])
    assert_told(slow, "writing", "checking")


def test_corpus_tells_how_much_text_is_tokenised(
    slow: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "BATCH_BYTES", 200)
    text = corpora.write_lines(tmp_path / "a.txt", corpora.LINES * 9)
    folder, tokenizer = str(tmp_path / "corpus"), ["--tokenizer", str(corpora.TINY_T5)]
    options = ["--workers", "1", "--shard-tokens", "200"]
    corpus.main(["build", folder, str(text), *tokenizer, *options])
    corpus.main(["verify", folder])
    assert_told(slow, "tokenising", "checksums of corpus")
    assert re.search(r"tokenising: [\d.]+/[\d.]+ kB, 0.0M tokens, .* left", "\n".join(slow.lines))


@pytest.mark.usefixtures("world_of_adaptations")
def test_adapt_tells_of_all_that_it_does(slow: Screen, tmp_path: Path) -> None:
    text = tmp_path / "validation.txt"
    text.write_text("\n".join(adaptations.LINES))
    evaluation = {"max_examples": 40, "every_steps": 2}
    changes: Any = {"validation_corpus": [str(text)], "evaluation": evaluation}
    config = adaptations.config_of(tmp_path, **changes)
    adapt_session.adapt(config)
    assert_told(slow, "measuring", "writing weights", "comparing checksums")
    slow.said.clear()
    adapt_session.adapt(config)
    assert_told(slow, "comparing checksums", "reading weights")
