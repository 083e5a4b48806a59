"""Results of several tasks side by side, and the benchmarks that they make up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from softprompt_dist.errors import DataError
from softprompt_dist.metrics.results import EvaluationResult, find_results
from softprompt_dist.metrics.suites import SUITES, suite_score
from softprompt_dist.metrics.table import markdown_table


def score_report(paths: Sequence[Path], *, partial: bool = False) -> str:
    """A table of results, and the score of each benchmark that they belong to.

    Args:
        paths: results.json files, folders of one, or folders of such folders.
        partial: whether the mean of a part of a benchmark will do.

    Raises:
        DataError: a file cannot be read, or two results do not belong together.
    """
    results = find_results(paths)
    scores = scores_by_task(results)
    lines = [_table(results.values()), ""]
    for name, suite in SUITES.items():
        if set(suite.members) & set(scores):
            lines.append(_suite_line(name, scores, partial))
    return "\n".join(lines).strip()


def scores_by_task(results: Mapping[Path, EvaluationResult]) -> dict[str, float]:
    """Task -> score, of results that belong together.

    Raises:
        DataError: a task has two results, or splits or backbones differ.
    """
    files: dict[str, Path] = {}
    first_path, first = next(iter(results.items()))
    for path, result in results.items():
        if result.task in files:
            raise DataError(
                f"{files[result.task]} and {path} both hold {result.task}. Name one result a task."
            )
        if result.split != first.split:
            raise DataError(
                f"{first_path} was scored on {first.split}, but {path} on {result.split}. A "
                "benchmark's score needs the same split everywhere."
            )
        known = first.identity and result.identity and first.identity.differences(result.identity)
        if known:
            raise DataError(
                f"{first_path} and {path} were scored with different backbones: {known[0]}. A "
                "benchmark's score needs the same backbone everywhere."
            )
        files[result.task] = path
    return {result.task: result.score for result in results.values()}


def _suite_line(name: str, scores: Mapping[str, float], partial: bool) -> str:
    try:
        return str(suite_score(name, scores, partial=partial))
    except DataError as error:
        return str(error)


def _table(results: Iterable[EvaluationResult]) -> str:
    header = ("task", "split", "n", "answers by", "values", "score", "95 % interval", "invalid")
    return markdown_table(header, [tuple(_cells(result)) for result in results])


def _cells(result: EvaluationResult) -> Iterator[str]:
    yield from (result.task, result.split, str(result.num_answers), result.method)
    yield ", ".join(f"{name} {value:.1f}" for name, value in result.values.items())
    yield f"{result.score:.1f}"
    interval = result.score_interval_95
    yield f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "-"
    yield str(result.num_invalid)
