"""Collects what tests marked `drill` have shown: the resilience table (`make drills`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.drills.table import DRILLS

REQUEUES, STEPS, SECONDS = "requeues", "steps_redone", "seconds_to_recover"
_RESULTS = pytest.StashKey["dict[str, Result]"]()
_NOTES = pytest.StashKey[dict[str, dict[str, float]]]()


@dataclass
class Result:
    """Of all the tests of one drill."""

    outcomes: list[str] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """passed, FAILED, skipped or not run; with the number of tests."""
        if "failed" in self.outcomes:
            return "FAILED"
        passed = self.outcomes.count("passed")
        if passed:
            return f"passed, {passed} test{'s' if passed > 1 else ''}"
        return "skipped" if self.outcomes else "NOT RUN"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--resilience-table=FILE`; apart, pytest would take a file that is there for tests."""
    parser.addoption(
        "--resilience-table",
        metavar="FILE",
        help="write the table of drills to FILE; fail where a drill has not passed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker, and a place for the results."""
    config.addinivalue_line("markers", "drill(*numbers): shows what a fault drill asks for")
    config.stash[_RESULTS] = defaultdict(Result)
    config.stash[_NOTES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A number that no drill has is a mistake."""
    for item in items:
        for number in numbers_of(item):
            assert number in DRILLS, f"{item.nodeid}: there is no drill {number}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep the outcome, and what `drilled` noted."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        noted = dict(item.user_properties)
        if REQUEUES in noted:
            item.config.stash[_NOTES][item.name] = noted
        for number in numbers_of(item):
            result = item.config.stash[_RESULTS][number]
            result.outcomes.append(report.outcome)
            result.steps += [noted[STEPS]] if STEPS in noted else []
            result.seconds += [noted[SECONDS]] if SECONDS in noted else []
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table; a drill that nobody has passed fails the session."""
    path = session.config.getoption("--resilience-table")
    if path is None or session.config.option.collectonly:
        return
    results = session.config.stash[_RESULTS]
    Path(path).write_text(f"{table(results)}\n{jobs_table(session.config.stash[_NOTES])}")
    if not all(results[number].verdict.startswith("passed") for number in DRILLS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    path = config.getoption("--resilience-table")
    if path is not None and Path(path).is_file():
        terminalreporter.section("resilience table")
        terminalreporter.write(Path(path).read_text())


def numbers_of(item: pytest.Item) -> list[str]:
    """Of the drills that a test shows something of."""
    return [str(number) for mark in item.iter_markers("drill") for number in mark.args]


def table(results: dict[str, Result]) -> str:
    """As markdown."""
    lines = [
        "| | drill | plain DeepSpeed | here | | steps redone | seconds to recover |",
        "|:--|:--|:--|:--|:--|--:|--:|",
    ]
    for number, drill in DRILLS.items():
        result = results[number]
        steps = f"{max(result.steps):g}" if result.steps else ""
        seconds = f"{max(result.seconds):.1f}" if result.seconds else ""
        cells = (number, drill.title, drill.control, drill.expected, result.verdict, steps, seconds)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def jobs_table(notes: dict[str, dict[str, float]]) -> str:
    """As markdown: every job of Slurm's that was queued again."""
    lines = ["| job | requeues | steps redone | seconds from one attempt to the next |"]
    lines.append("|:--|--:|--:|--:|")
    for name, noted in notes.items():
        figures = [f"{noted[key]:g}" if key in noted else "" for key in (REQUEUES, STEPS, SECONDS)]
        told = name.removeprefix("test_").replace("_s_", "'s_").replace("_", " ")
        lines.append(f"| {told} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"
