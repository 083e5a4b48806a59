"""`softprompt slurm`: adaptation, tuning and evaluation as batch jobs that wait for each other.

softprompt slurm render pipeline.yaml
softprompt slurm pipeline pipeline.yaml
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.verb import VerbParser, run_verb

if TYPE_CHECKING:
    from softprompt_dist.scheduling.progress import StageState
    from softprompt_dist.scheduling.record import SubmittedJob
    from softprompt_dist.scheduling.stages import Pipeline


def build_parser() -> VerbParser:
    """Options of `softprompt slurm`."""
    parser = VerbParser("slurm", "Run adaptation, tuning and evaluation as batch jobs of Slurm.")
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_ActionParser
    )
    render = actions.add_parser("render", help="show the jobs of a pipeline and check them")
    pipeline = actions.add_parser("pipeline", help="check, then submit what is not done yet")
    for action in (render, pipeline):
        action.add_argument(
            "pipeline", metavar="RECIPE", help="packaged pipeline, or a YAML file that names stages"
        )
        action.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="override one key of the recipe, such as sbatch.partition=gpu; repeatable",
        )
    pipeline.add_argument(
        "--dry-run", action="store_true", help="show what would be submitted now, and stop"
    )
    return parser


class _ActionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`.

    Raises:
        ConfigError: the pipeline's recipe is wrong.
        ChecksFailedError: a check failed; nothing was submitted.
        SubmissionError: Slurm took some of the jobs only.
    """
    options = build_parser().parse_args(argv)
    from softprompt_dist.scheduling.pipeline_recipe import load_pipeline
    from softprompt_dist.scheduling.stages import Pipeline

    pipeline = Pipeline.of(load_pipeline(options.pipeline, options.overrides))
    for line in _ACTIONS[options.action](pipeline, options):
        print(line, flush=True)


def _render(pipeline: Pipeline, options: argparse.Namespace) -> Iterator[str]:
    """The whole pipeline, as if nothing of it had been done."""
    from softprompt_dist.checks.finding import table, verdict
    from softprompt_dist.scheduling.examination import check_sbatch, examine
    from softprompt_dist.scheduling.progress import untouched

    found = examine(pipeline)
    states = [untouched(job) for job in found.jobs]
    yield from _command_lines(states)
    findings = [*found.findings, *check_sbatch(states, os.environ, is_needed=False)]
    yield table(findings)
    yield verdict(findings)


def _pipeline(pipeline: Pipeline, options: argparse.Namespace) -> Iterator[str]:
    """What is not done and does not wait yet."""
    from softprompt_dist.checks.finding import table, verdict
    from softprompt_dist.scheduling import submission
    from softprompt_dist.scheduling.examination import check_progress, check_sbatch, examine
    from softprompt_dist.scheduling.progress import all_states
    from softprompt_dist.scheduling.record import PipelineRecord

    found = examine(pipeline)
    record = PipelineRecord(pipeline.directory)
    known = record.jobs()
    states = all_states(found.jobs, known)
    evaluate = pipeline.config.evaluate
    findings = check_progress(found, states, evaluate.split if evaluate else None)
    findings += check_sbatch(states, os.environ, is_needed=not options.dry_run)
    yield table(findings)
    yield verdict(findings)
    yield ""
    yield from (submission.part_line(state, part) for state in states for part in state.parts)
    yield ""
    if not any(state.to_submit for state in states):
        yield "There is nothing to submit: all is done, or waits or runs already."
        yield from _watching(pipeline, submission.still_queued(states, known))
    elif options.dry_run:
        yield from _command_lines(states)
        yield "Nothing was submitted (--dry-run)."
    else:
        work = submission.Submission(pipeline.config.name, record, known, os.environ)
        yield from work.submit(states)
        yield from _watching(pipeline, [*submission.still_queued(states, known), *work.submitted])


def _command_lines(states: Sequence[StageState]) -> Iterator[str]:
    """What would be submitted, to be read and to be typed."""
    from softprompt_dist.scheduling.batch_job import shell_lines
    from softprompt_dist.scheduling.submission import commands, heading

    for state, command in commands(states):
        yield f"# {heading(state)}"
        yield from shell_lines(state.job.environment, command)
        yield ""


def _watching(pipeline: Pipeline, jobs: Sequence[SubmittedJob]) -> Iterator[str]:
    import shlex

    from softprompt_dist.scheduling.submission import cancel_command

    if jobs:
        yield ""
        yield f"watch:   squeue --jobs={','.join(job.id for job in jobs)}"
        yield f"logs:    {shlex.quote(str(pipeline.log_folder))}"
        yield f"cancel:  {cancel_command(jobs)}"
        yield "A run that shall save and end: touch STOP in its run directory."


_ACTIONS = {"render": _render, "pipeline": _pipeline}


if __name__ == "__main__":
    run_verb(main)
