"""`softprompt tasks`: which tasks are known by name, the text that each gives, what they scored.

softprompt tasks show boolq --examples 3 --data BoolQ.zip
softprompt tasks score results/superglue
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NoReturn

from softprompt_dist.data.catalogue.definition import CatalogueTask, HubSource
from softprompt_dist.data.catalogue.registry import CATALOGUE, find_task
from softprompt_dist.data.catalogue.samples import sample_rows
from softprompt_dist.data.examples import Example
from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.parallel.verb import VerbParser, count, run_verb

_SUITES = {
    "superglue": "SuperGLUE",
    "glue": "GLUE",
    "mrqa": "MRQA: spans, for a prompt tuned on squad",
    "squad": "SQuAD",
    "dpr": "Definite pronoun resolution",
    "classification": "Classification, in T5's manner",
}
_MOST_LABELS = 6


def build_parser() -> VerbParser:
    """Options of `softprompt tasks`."""
    parser = VerbParser("tasks", "Show the tasks and metrics that are known by name.")
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_ActionParser
    )
    actions.add_parser("list", help="all tasks: labels, metrics, data set")
    _add_show_options(actions.add_parser("show", help="a task and the exact text of examples"))
    actions.add_parser("metrics", help="all metrics")
    _add_score_options(actions.add_parser("score", help="results side by side; SuperGLUE's score"))
    return parser


class _ActionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}\n{self.format_usage().strip()}")


def _add_show_options(show: argparse.ArgumentParser) -> None:
    show.add_argument("name", metavar="NAME", help="a task of `softprompt tasks list`")
    show.add_argument(
        "--examples", metavar="N", type=count, default=3, help="how many (default: 3)"
    )
    show.add_argument("--prefixed", action="store_true", help="with T5's task prefix")
    show.add_argument(
        "--data",
        metavar="PATH",
        help="rows of yours: a jsonl, csv or parquet file; SuperGLUE's zip, or its folder",
    )
    show.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default="validation",
        help="of a zip or a folder; train is what T5 trains on (default: %(default)s)",
    )


def _add_score_options(score: argparse.ArgumentParser) -> None:
    score.add_argument(
        "results",
        metavar="FILE_OR_FOLDER",
        nargs="+",
        type=Path,
        help="a results.json of `softprompt evaluate`, its folder, or a folder of such folders",
    )
    score.add_argument(
        "--partial", action="store_true", help="the mean of those tasks that are there will do"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    print("\n".join(_ACTIONS[options.action](options)))


def _list(_: argparse.Namespace) -> Iterator[str]:
    rows = {task.name: _row(task) for task in CATALOGUE.values()}
    widths = [max(map(len, column)) + 2 for column in zip(*rows.values(), strict=True)]
    for suite, tasks in groupby(CATALOGUE.values(), key=lambda task: task.suite):
        yield from ("", _SUITES[suite]) if suite != "superglue" else (_SUITES[suite],)
        for task in tasks:
            cells = zip(rows[task.name], widths, strict=True)
            yield "  " + "".join(cell.ljust(width) for cell, width in cells).rstrip()


def _row(task: CatalogueTask) -> tuple[str, ...]:
    return task.name, labels_text(task), ", ".join(task.metrics), hub_text(task.hub)


def labels_text(task: CatalogueTask) -> str:
    """The task's target texts, or what they are."""
    if not task.labels:
        return "free text"
    if len(task.labels) > _MOST_LABELS:
        return f"{', '.join(task.labels[:2])} ... {task.labels[-1]}"
    return ", ".join(task.labels)


def hub_text(hub: HubSource) -> str:
    """The data set's name and configuration on the hub."""
    return " ".join(filter(None, (hub.name, hub.subset)))


def _show(options: argparse.Namespace) -> Iterator[str]:
    task = find_task(options.name)
    yield f"{task.name}: {task.title}"
    yield from (f"  {name:<9}{value}" for name, value in _facts(task))
    examples, origin = _examples(task, options)
    yield f"\n{len(examples)} of {origin}:"
    prefix = task.prefix if options.prefixed else ""
    for number, example in enumerate(examples, 1):
        yield from _example(number, prefix, example)


def _facts(task: CatalogueTask) -> Iterator[tuple[str, str]]:
    splits = [("train", task.hub.train), ("validation", task.hub.validation)]
    splits.append(("test", task.hub.test))
    named = [split if split == name else f"{split} ({name})" for split, name in splits if name]
    yield "labels", ", ".join(task.labels) or "free text"
    yield "metrics", ", ".join(task.metrics)
    yield "family", f"{task.family} (what kind of answer a prompt for it gives)"
    yield "text", task.source
    yield "prefix", f"{task.prefix!r} (only with task.prefixed, or --prefixed here)"
    yield "fields", ", ".join(task.fields)
    yield "hub", f"{hub_text(task.hub)}: {', '.join(named)}"
    if task.folder:
        yield "zip", f"folder {task.folder}"


def _examples(task: CatalogueTask, options: argparse.Namespace) -> tuple[list[Example], str]:
    if options.data:
        return _examples_of(task, Path(options.data), options.split, options.examples)
    for_training = options.split == "train"
    made = (e for row in sample_rows(task.name) for e in task.to_examples(row, for_training))
    examples = list(islice(made, options.examples))
    return examples, "the sample rows of this package, which are its own (--data takes yours)"


def _examples_of(
    task: CatalogueTask, path: Path, split: str, count: int
) -> tuple[list[Example], str]:
    from softprompt_dist.data.tasks import load_task
    from softprompt_dist.task_config import TaskConfig, source_at

    source = source_at(path, split)
    if source.kind == "superglue" and task.folder is None:
        raise DataError(
            f"--data is {path}, but only SuperGLUE has zips and folders, and {task.name} is none "
            f"of it. Name a jsonl, csv or parquet file."
        )
    loaded = load_task(TaskConfig(catalogue=task.name, source=source), (split,))
    examples = loaded.splits[split]
    return list(
        examples[:count]
    ), f"the {len(examples):,} examples of {loaded.records[split].origin}"


def _example(number: int, prefix: str, example: Example) -> Iterator[str]:
    """Texts in JSON's quotes: line ends and spaces at the end are seen."""
    yield f"\n{number:>3}  input   {_quoted(prefix + example.input_text)}"
    yield f"     target  {_quoted(example.target_text)}"
    for name, value in example.facts.items():
        yield f"     {name:<8}{_quoted(value)}"


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _metrics(_: argparse.Namespace) -> Iterable[str]:
    from softprompt_dist.metrics.registry import METRICS

    width = max(map(len, METRICS)) + 2
    return (f"{name:<{width}}{metric.title}" for name, metric in METRICS.items())


def _score(options: argparse.Namespace) -> Iterable[str]:
    from softprompt_dist.metrics.score_report import score_report

    return [score_report(options.results, partial=options.partial)]


_ACTIONS = {"list": _list, "show": _show, "metrics": _metrics, "score": _score}

if __name__ == "__main__":
    run_verb(main)
