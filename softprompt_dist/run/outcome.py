"""What a finished run says: test scores beside their floors, on its tasks and on those beyond."""

from __future__ import annotations

import json
from collections.abc import Sequence

from softprompt_dist.durable import replace_file
from softprompt_dist.errors import MachineError
from softprompt_dist.names import path_inside
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.evaluation import answer, evaluation_of
from softprompt_dist.run.evaluation_report import EvaluationFiles, screen_text, write_evaluation
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.judgement import judge
from softprompt_dist.run.learning_curve import plot_learning_curve
from softprompt_dist.run.loop import Records, score_name, score_values
from softprompt_dist.run.saved_state import TuningState
from softprompt_dist.run.transfer import Domain, transfer_table, write_transfer
from softprompt_dist.run.tuning import TuningRun

UNTUNED = "untuned prompt"
TUNED = "the tuned prompt"


def record_untuned(run: TuningRun, directory: RunDirectory) -> None:
    """All ranks: keep what the prompt, as it was initialised, answers to the test splits."""
    count = run.config.evaluation.max_test_examples
    answered = [
        answer(run, run.prompt, task, "test", count, who=f"the {UNTUNED}") for task in run.tasks
    ]
    texts = {each.task.name: [p.text for p in each.predictions] for each in answered}
    ranks.on_main(lambda: replace_file(directory.untuned, json.dumps(texts).encode()))


def report_outcome(run: TuningRun, state: TuningState, records: Records) -> None:
    """All ranks: score the best prompt on all test splits; rank 0 writes and prints the reports."""
    best = SoftPrompt(state.best_prompt_PD).to(run.prompt.weight.device)
    count = run.config.evaluation.max_test_examples
    own = [answer(run, best, task, "test", count, who=TUNED) for task in run.tasks]
    elsewhere = [
        answer(run, best, task, name, who=TUNED) for task in run.transfers for name in task.splits
    ]

    directory, journal = records.directory, records.journal

    def write() -> None:
        records.attempt.check_ours()  # scoring took long
        prompt_file, untuned = directory.prompts / "best.safetensors", _untuned_answers(directory)
        domains = []
        for answered in own:
            name = answered.task.name
            others = {UNTUNED: untuned[name]} if name in untuned else {}
            asked = evaluation_of(run, answered, prompt_file, others)
            domains.append(Domain(asked, judge(asked), is_tuned=True))
        for answered in elsewhere:
            asked = evaluation_of(run, answered, prompt_file)
            domains.append(Domain(asked, judge(asked), is_tuned=False))
        _write(run, state, directory, journal, domains)

    ranks.on_main(write)


def _untuned_answers(directory: RunDirectory) -> dict[str, list[str]]:
    """Those of `record_untuned`; none where somebody has removed the file."""
    try:
        answers: dict[str, list[str]] = json.loads(directory.untuned.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return answers


def _write(
    run: TuningRun,
    state: TuningState,
    directory: RunDirectory,
    journal: Journal,
    domains: list[Domain],
) -> None:
    own, *others = domains
    tuned = [domain for domain in domains if domain.is_tuned]
    curve = directory.plots / "learning_curve.png"
    plot_learning_curve(directory.metrics, _floors(tuned), curve, score=score_name(run.tasks))
    files = EvaluationFiles(
        directory.report,
        directory.results,
        directory.predictions / "test.jsonl",
        directory.plots / "confusion.png",
    )
    write_evaluation(files, own.evaluation, own.judgement, {"Learning curve": curve})
    for domain in others:
        write_evaluation(
            EvaluationFiles.below(
                path_inside(directory.path, *domain.folder.split("/"), error=MachineError)
            ),
            domain.evaluation,
            domain.judgement,
        )
    found = [domain.judgement.subject for domain in tuned]
    journal.log(state.step, score_values(run.tasks, found), kind="test")
    journal.say(f"\n{own.title}\n\n{screen_text(own.evaluation, own.judgement)}")
    if others:
        write_transfer(directory.transfer, domains)
        journal.say(f"\n{transfer_table(domains)}")
    journal.say(f"Best prompt (step {state.best_step}): {directory.prompts / 'best.safetensors'}")
    journal.say(f"Learning curve: {curve}")


def _floors(tuned: Sequence[Domain]) -> dict[str, float]:
    """Those that all the tasks have: the mean over the tasks, as the validation score is one."""
    shared = [name for name in tuned[0].floors if all(name in domain.floors for domain in tuned)]
    return {
        f"{name} (test)": sum(d.judgement.scores[name].score for d in tuned) / len(tuned)
        for name in shared
    }
