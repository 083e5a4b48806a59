"""Faults put into a tuning run: signals, a rank that waits, hangs or computes NaN.

As a module: `softprompt train` with SOFTPROMPT_FAULT="RANK STEP SECONDS", for which that rank waits
in that step, or "RANK STEP nan", where that rank's loss is NaN.
"""

import json
import math
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.lifecycle import attempt, ownership
from softprompt_dist.outcome_files import first_line
from softprompt_dist.parallel import ranks, stop
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import checkpoint, loop, outcome, session, step, tuning


def carry_out(plan, recipe):
    """All ranks: each `(overrides, faults)` of `plan` in this world; how each attempt ended."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(attempt, "_LOOK_SECONDS", 0.0))
        patches.enter_context(mock.patch.object(ownership, "_SETTLING_SECONDS", 0.0))
        for name in ("plot_learning_curve", "write_evaluation"):  # plots take seconds
            patches.enter_context(mock.patch.object(outcome, name))
        return [carried_out(load_recipe(TuneConfig, recipe, o), faults) for o, faults in plan]


def carried_out(config, faults):
    folder = Path(config.run_directory)
    ranks.on_main(lambda: (folder / "STOP").unlink(missing_ok=True))
    said, error, steps_at, started = [], "", [], time.monotonic()
    with ExitStack() as patches:
        for kind, *details in faults:
            patches.enter_context(FAULTS[kind](folder, *details))
        patches.enter_context(
            before(loop.Vitals, "_name", lambda _, found: said.append(found.rank))
        )
        patches.enter_context(
            before(loop.Vitals, "end_step", lambda *given: steps_at.append(time.monotonic()))
        )
        stop.listen()
        try:
            session.train(config)
        except SoftpromptError as failure:
            error = f"{type(failure).__name__}: {failure}"
        stop.forget()
    return {
        "error": error,
        "why": ranks.on_main(lambda: first_line(folder / "why")),
        "published": ranks.on_main(lambda: published(folder)),
        "stragglers": said,
        "seconds_to_first_step": (steps_at or [time.monotonic()])[0] - started,
    }


def published(run_dir):
    """Steps of the checkpoints that are there."""
    return sorted(int(p.name.removeprefix("step-")) for p in run_dir.glob("checkpoints/step-*"))


def before(owner, name, act):
    """Patches `owner.name`: `act` is called with its arguments first."""
    real = getattr(owner, name)

    def acting(*given, **named):
        act(*given)
        return real(*given, **named)

    return mock.patch.object(owner, name, acting)


def signals_in_step(folder, rank, number, name):
    """In the batch of the step of that number, counted in this attempt's batches."""
    return in_step(rank, number, lambda: send(name))


def in_step(rank, number, act):
    steps = iter(range(1, 10_000))
    return before(
        tuning.TuningRun,
        "batches",
        lambda *given: act() if next(steps) == number and ranks.rank() == rank else None,
    )


def signals_before(folder, rank, place, name):
    owner = {"load_backbone": tuning, "save": checkpoint.CheckpointStore}.get(place, session)
    return before(owner, place, lambda *given: send(name) if ranks.rank() == rank else None)


def signals_in_validation(folder, rank, number, name):
    """Of that step."""
    return before(
        loop,
        "validate",
        lambda run, state, records: (
            send(name) if ranks.rank() == rank and state.step == number else None
        ),
    )


def writes_stop(folder, rank, number):
    return in_step(rank, number, lambda: (folder / "STOP").write_text("enough\n"))


def is_superseded(folder, rank, number):
    def take_over():
        path = folder / "attempt.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"token": "f" * 32}))
        (folder / "why").write_text("another's\n")

    return in_step(rank, number, take_over)


def waits(folder, rank, seconds):
    return before(
        tuning.TuningRun,
        "batches",
        lambda *given: time.sleep(seconds) if ranks.rank() == rank else None,
    )


def computes_nan(folder, rank, number):
    real, calls = step.token_loss, iter(range(1, 10_000))

    def token_loss(*given, **named):
        loss = real(*given, **named)
        # One micro-batch is a step here.
        if next(calls) == number and ranks.rank() == rank:
            return loss._replace(total=loss.total * float("nan"))
        return loss

    return mock.patch.object(step, "token_loss", token_loss)


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


FAULTS = {
    "signal in step": signals_in_step,
    "signal before": signals_before,
    "signal in validation": signals_in_validation,
    "STOP in step": writes_stop,
    "superseded in step": is_superseded,
    "waits": waits,
    "NaN in step": computes_nan,
}


def main():
    from softprompt_dist import train
    from softprompt_dist.parallel.verb import run_verb

    rank, number, seconds = map(float, os.environ["SOFTPROMPT_FAULT"].split())
    is_nan = math.isnan(seconds)
    waiting = in_step(rank, number, lambda: time.sleep(seconds))
    with computes_nan(None, rank, number) if is_nan else waiting:
        run_verb(train.main)


if __name__ == "__main__":
    main()
