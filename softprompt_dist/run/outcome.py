"""What a finished run says: test scores beside their floors, predictions, plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from softprompt_dist.data.examples import Example
from softprompt_dist.data.floors import majority_class, naive_bayes
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.module import SoftPrompt
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.journal import Journal
from softprompt_dist.run.loop import TuningState
from softprompt_dist.run.metrics import accuracy
from softprompt_dist.run.report import ScoreRow, plot_learning_curve, write_report
from softprompt_dist.run.tuning import Bench, Split, TuningRun


def test_split(run: Bench) -> Split:
    """The examples that the run's test score counts."""
    return run.splits["test"].sample(run.config.evaluation.max_test_examples)


def count_correct(predictions: Sequence[str], examples: Sequence[Example]) -> int:
    """How many predictions equal their targets (white space at the ends aside)."""
    targets = [example.target_text.strip() for example in examples]
    return sum(p.strip() == t for p, t in zip(predictions, targets, strict=True))


def count_untuned(run: TuningRun) -> int:
    """All ranks: correct test answers of the prompt as it was initialised."""
    split = test_split(run)
    return count_correct(run.scorer.predict(run.prompt, split.tokens), split.texts)


def report_outcome(
    run: TuningRun, state: TuningState, directory: RunDirectory, journal: Journal
) -> None:
    """All ranks: score the best prompt on the test split; rank 0 writes and prints the report."""
    split = test_split(run)
    best = SoftPrompt(state.best_prompt_PD).to(run.prompt.weight.device)
    predictions = run.scorer.predict(best, split.tokens)
    targets = [example.target_text.strip() for example in split.texts]
    journal.log(state.step, {"accuracy": accuracy(predictions, targets)}, kind="test")
    ranks.on_main(lambda: _write(run, state, directory, journal, predictions))


def _write(
    run: TuningRun,
    state: TuningState,
    directory: RunDirectory,
    journal: Journal,
    predictions: list[str],
) -> None:
    split = test_split(run)
    total = len(split.texts)
    rows = [
        ScoreRow(
            "majority class",
            count_correct(majority_class(run.task, split.texts), split.texts),
            total,
        ),
        ScoreRow(
            "naive Bayes", count_correct(naive_bayes(run.task, split.texts), split.texts), total
        ),
        ScoreRow("untuned prompt", state.untuned_correct, total),
        ScoreRow("tuned prompt", count_correct(predictions, split.texts), total),
    ]
    write_predictions(directory.predictions / "test.jsonl", split.texts, predictions)
    floors = {f"{row.name} (test)": row.accuracy for row in rows[:2]}
    plot = directory.plots / "learning_curve.png"
    plot_learning_curve(directory.metrics, floors, plot)
    journal.say(
        "\n" + write_report(directory, rows, title=f"{run.config.name}: {run.task.name}, test")
    )
    journal.say(f"Best prompt (step {state.best_step}): {directory.prompts / 'best.safetensors'}")
    journal.say(f"Learning curve: {plot}")


def write_predictions(path: Path, examples: Sequence[Example], predictions: Sequence[str]) -> None:
    """One JSON object a row: input, target, prediction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example, prediction in zip(examples, predictions, strict=True):
            row = {
                "input": example.input_text,
                "target": example.target_text.strip(),
                "prediction": prediction,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
