"""The score of a benchmark: the mean over its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from softprompt_dist.errors import DataError


@dataclass(frozen=True)
class Suite:
    """A benchmark; `tasks`: its tasks -> the tasks of the catalogue whose scores make each."""

    title: str
    tasks: Mapping[str, tuple[str, ...]]

    @property
    def members(self) -> tuple[str, ...]:
        """All its tasks of the catalogue."""
        return tuple(member for members in self.tasks.values() for member in members)


@dataclass(frozen=True)
class SuiteScore:
    """Mean of its tasks' scores, in percent; a part of them where some are missing."""

    suite: Suite
    score: float
    done: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """One line for people."""
        total = len(self.done) + len(self.missing)
        if not self.missing:
            return f"{self.suite.title} score: {self.score:.1f} (mean of {total} tasks)"
        return (
            f"{self.suite.title} score: {self.score:.1f}, partial ({len(self.done)} of {total}; "
            f"without {', '.join(self.missing)})"
        )


def _alone(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


SUITES = {
    "superglue": Suite(
        "SuperGLUE", _alone("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    ),
    "glue": Suite(
        "GLUE",
        {
            **_alone("cola", "sst2", "mrpc", "stsb", "qqp"),
            "mnli": ("mnli", "mnli_mismatched"),
            **_alone("qnli", "glue_rte", "wnli"),
        },
    ),
}
"""Name -> benchmark. A task counts once, whatever number of metrics or sets it has."""


def suite_score(name: str, scores: Mapping[str, float], *, partial: bool = False) -> SuiteScore:
    """Mean over the tasks of a suite.

    Args:
        name: of `SUITES`.
        scores: task -> its score in percent; tasks that are not the suite's are passed over.
        partial: whether the mean of a part of the tasks will do.

    Raises:
        DataError: tasks are missing and not `partial`, or there is none of them.
    """
    suite = SUITES[name]
    missing = [member for member in suite.members if member not in scores]
    done = [task for task, members in suite.tasks.items() if not set(members) & set(missing)]
    if not done or (missing and not partial):
        raise DataError(
            f"{suite.title} has no score yet: it is the mean over {len(suite.tasks)} tasks, but "
            f"there are no results of {', '.join(missing)}. Evaluate these"
            + (", or ask for the mean of the others with --partial." if done else ".")
        )
    means = [sum(scores[m] for m in suite.tasks[t]) / len(suite.tasks[t]) for t in done]
    left = tuple(task for task in suite.tasks if task not in done)
    return SuiteScore(suite, sum(means) / len(means), tuple(done), left)
