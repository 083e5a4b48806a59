"""The loop of an adaptation: update, log, measure, save, export."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.curves import draw_curves
from softprompt_dist.adaptation.exporting import export_run, folder_of
from softprompt_dist.adaptation.peak import Peak, find_peak
from softprompt_dist.adaptation.run import AdaptationRun, state_of
from softprompt_dist.adaptation.saving import CheckpointSaver
from softprompt_dist.adaptation.throughput import Throughput
from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.data.lm.stream import BatchStream
from softprompt_dist.errors import BackboneError, NonFiniteLossError, StoppedError
from softprompt_dist.lifecycle.attempt import Attempt
from softprompt_dist.lifecycle.spikes import SPIKE
from softprompt_dist.lifecycle.vitals import Vitals
from softprompt_dist.lifecycle.watchdog import doing, tick
from softprompt_dist.parallel import ranks
from softprompt_dist.planning.work import training_operations
from softprompt_dist.progress import phase
from softprompt_dist.run.checkpoint_folder import outcome_of_saving
from softprompt_dist.run.directory import RunDirectory
from softprompt_dist.run.journal import Journal


@dataclass(frozen=True)
class Records:
    """Where an attempt at an adaptation leaves what it does."""

    directory: RunDirectory
    journal: Journal
    attempt: Attempt
    vitals: Vitals
    saver: CheckpointSaver


class AdaptationLoop:
    """All ranks: from where the run is to its last step."""

    def __init__(self, run: AdaptationRun, records: Records) -> None:
        self.run, self.config, self.records = run, run.config, records
        self.journal, self.attempt = records.journal, records.attempt
        self.saver = records.saver
        self.measured: tuple[int, dict[str, float]] = (-1, {})
        """Step and values of the latest measurement of this attempt."""
        with phase("measuring what this machine can do"):
            peak, operations = find_peak(_dtype(self.config)), _operations(run)
        self.throughput = None if operations is None else Throughput(operations, peak)
        self.journal.say(_headline(run, peak))

    def train(self, batches: BatchStream) -> None:
        """All ranks: updates up to the last step.

        Raises:
            StoppedError: on all ranks, when somebody asked to stop and the state is saved.
        """
        run, config = self.run, self.config
        self.attempt.note(step=run.step)
        self._catch_up()
        while run.step < config.steps:
            with doing(f"step {run.step + 1}", self.records.vitals.step_limit_seconds):
                metrics = self._update(batches)
            self._log(metrics)
            why = self._why_stop() or self._measure_if_due()
            is_saved = self._save_if_due(at_once=bool(why) or self._is_exported)
            if why:
                raise self.attempt.stopped(why, run.step)
            if self._is_exported:
                self._export()
            if is_saved and run.step < config.steps:
                self._end_if_asked()  # before another step, which would be saved for as long again

    def _save_if_due(self, *, at_once: bool) -> bool:
        """All ranks: whether the state is on the disk."""
        if at_once:
            self.saver.save_now(state_of(self.run))
        elif self._is_due(self.config.checkpoint.every_steps):
            self.saver.save(state_of(self.run))
            return not self.config.checkpoint.background
        return at_once

    def _catch_up(self) -> None:
        """What an attempt that ended after the checkpoint of this step has not come to."""
        run, steps = self.run, self.config.steps
        if run.step == 0:
            self._measure_untrained()
        why = self._measure_if_due()
        if why:
            raise self.attempt.stopped(why, run.step)
        if run.step == steps:
            self.journal.say(f"All {steps} steps are done; nothing is trained.")
        if self._is_exported:
            self._export()

    @property
    def _is_exported(self) -> bool:
        return self.run.step in (*self.config.export.steps, self.config.steps)

    def _is_due(self, every_steps: int) -> bool:
        """Whether what is done every so many steps, and at the last, is done now."""
        return self.run.step % every_steps == 0 or self.run.step == self.config.steps

    def _log(self, metrics: dict[str, float]) -> None:
        if self._is_due(self.config.log_every_steps) or SPIKE in metrics:
            left = self.config.steps - self.run.step
            speed = self.throughput.read(left) if self.throughput else {}
            self.journal.log(self.run.step, metrics | speed)
        else:
            self.journal.passed(self.run.step)

    def _update(self, batches: BatchStream) -> dict[str, float]:
        run, vitals = self.run, self.records.vitals
        vitals.begin_step()
        started = time.monotonic()
        step_batches = next(batches)
        try:
            metrics = run.update(step_batches, vitals.arrive)
        except NonFiniteLossError as error:
            saved = outcome_of_saving(run.step, lambda: self.saver.save_now(state_of(run)))
            raise NonFiniteLossError(
                f"{error} {saved} A resume goes on with the same settings: with others, begin anew "
                "(--fresh, or another --run-dir)."
            ) from error
        seconds = time.monotonic() - started
        run.seconds += seconds
        tokens = step_batches.num_real_tokens
        if self.throughput:
            self.throughput.count(tokens, step_batches.num_positions, seconds)
        return metrics | vitals.end_step(run.step, metrics | {"num_tokens": tokens})

    def _why_stop(self) -> str:
        """All ranks: why the run must end, or nothing; a checkpoint that failed is raised."""
        why = self.attempt.stop_wanted(failed=self.saver.has_failed)
        if why == "failure":
            self.saver.wait()
            raise AssertionError("a rank's writer failed, and this one's did not")
        return why

    def _end_if_asked(self) -> None:
        """All ranks: in the middle of what the resume of a saved state will do again."""
        tick()
        why = self._why_stop()
        if why:
            raise self.attempt.stopped(why, self.run.step)

    def _measure_if_due(self) -> str:
        """All ranks: why the run must end, if somebody asked for it meanwhile; else empty."""
        if not self._is_due(self.config.evaluation.every_steps):
            return ""
        if self.run.measured_step == self.run.step:
            return ""
        try:
            self._measure()
        except StoppedError:
            return self._why_stop()
        return ""

    def _measure_untrained(self) -> None:
        try:
            self._measure()
        except StoppedError as stopped:
            why = self._why_stop()
            error = StoppedError(
                f"{why} while measuring the untrained model. The same command begins again there."
            )
            error.outcome = stopped.outcome
            raise error from None

    def _measure(self) -> dict[str, float]:
        """All ranks: of the weights as they are; measured once a step."""
        step = self.run.step
        if self.measured[0] != step:
            with doing(f"measuring step {step}", self.config.health.step_timeout_seconds):
                self.measured = (step, self.run.measure(self._end_if_asked))
            if self.measured[1]:
                self.journal.log(step, self.measured[1], kind="validation")
        with doing("drawing curves", self.config.health.slow_timeout_seconds):
            draw_curves(self.records.directory)
        return self.measured[1]

    def _export(self) -> None:
        """All ranks: of a state that is saved; cut whole where somebody asks to stop."""
        folder = folder_of(self.records.directory.path, self.config, self.run.step)
        measured = self._measure()
        with doing(f"exporting step {self.run.step}", self.config.health.slow_timeout_seconds):
            written = export_run(self.run, folder, measured, self._end_if_asked)
        for path in written:
            self.journal.say(f"Exported to {path}.")


def _dtype(config: AdaptConfig) -> torch.dtype:
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def _operations(run: AdaptationRun) -> float | None:
    """Of one update on all ranks; None for a model that we have no numbers for."""
    hf_config = run.source.hf_config
    try:
        architecture = architecture_of(hf_config.model_type, hf_config.to_dict())
    except BackboneError:
        return None
    return training_operations(
        architecture,
        run.config.batch.global_batch_size,
        run.data.inputs_length or 0,
        run.data.targets_length,
    )


def _headline(run: AdaptationRun, peak: Peak) -> str:
    config = run.config
    begins = f"resuming after step {run.step}" if run.step else "starting"
    return (
        f"{config.name}: {begins}, {config.steps} steps of {config.batch.global_batch_size} "
        f"rows, {config.objective}, {run.engine.num_weights:,} weights, ZeRO stage "
        f"{config.engine.zero_stage}, {run.data.num_examples:,} examples an epoch, "
        f"{ranks.world_size()} rank(s) on {ranks.device_name()}. {peak.source}"
    )
