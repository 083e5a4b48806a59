"""The run directory: one place that says where everything of a run lies.

runs/demo/config.yaml        the whole recipe, as run
          environment.json   versions, commit and hardware of every attempt
          data.json          origin, size and digest of every split
          metrics.jsonl      one line per logged step
          tensorboard/       the same numbers as TensorBoard events
          prompt/            best.safetensors, the result
          checkpoints/       what a resume continues from
          predictions/       test rows with what the prompt answered
          plots/             learning curve, confusion matrix
          report.md, results.json
          transfer.md, transfer.json, transfer/, tasks/   scores on other tasks
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softprompt_dist.durable import replace_file
from softprompt_dist.outcome_files import not_writable
from softprompt_dist.parallel import ranks


class RunDirectory:
    """Paths of one run below `path`; nothing is made before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.prompts = self.path / "prompt"
        self.checkpoints = self.path / "checkpoints"
        self.predictions = self.path / "predictions"
        self.untuned = self.predictions / "untuned.json"
        self.plots = self.path / "plots"
        self.report = self.path / "report.md"
        self.results = self.path / "results.json"
        self.transfer = self.path / "transfer.md"

    def create(self, *, tunes: bool = True) -> None:
        """Make the folders and try a write, long before the first save needs one; all ranks.

        Args:
            tunes: whether the run leaves prompts and predictions.

        Raises:
            MachineError: on all ranks, when the directory cannot be made or written.
        """
        ranks.on_main(lambda: self._or_machine_error(lambda: self._create(tunes)))

    def record(
        self,
        config_yaml: str,
        environment: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the recipe and what is known of the data, and add this attempt; all ranks.

        Raises:
            MachineError: on all ranks, when the files cannot be written.
        """
        ranks.on_main(
            lambda: self._or_machine_error(lambda: self._record(config_yaml, environment, data))
        )

    def _create(self, tunes: bool) -> None:
        own = (self.prompts, self.predictions) if tunes else ()
        for folder in (self.path, self.tensorboard, self.checkpoints, self.plots, *own):
            folder.mkdir(parents=True, exist_ok=True)
        probe = self.path / ".write-test"
        replace_file(probe, b"")
        probe.unlink()

    def _record(
        self, config_yaml: str, environment: Mapping[str, Any], data: Mapping[str, Any] | None
    ) -> None:
        replace_file(self.config, config_yaml.encode())
        if data is not None:
            replace_file(self.data, json.dumps(data, indent=2, ensure_ascii=False).encode())
        attempts = [*self._earlier_attempts(), dict(environment)]
        replace_file(self.environment, json.dumps({"attempts": attempts}, indent=2).encode())

    def _earlier_attempts(self) -> list[Any]:
        try:
            return list(json.loads(self.environment.read_bytes())["attempts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []

    def _or_machine_error(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise not_writable(self.path, error) from error
